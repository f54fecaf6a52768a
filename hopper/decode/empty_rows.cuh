// The rows of O and LSE that belong to no unit: of a sequence without a key that a query sees, unused ones,
// and rows of packed Q before the first and after the last sequence. And new keys that belong to none.

#pragma once

#include "new_keys.cuh"
#include "work.cuh"

#include <cmath>

namespace flash8 {

// By all threads of the grid; a warp has one row of one head at a time.
template <class Config>
class EmptyRows {
  public:
    __device__ explicit EmptyRows(DecodeParams const& params) : params_(params) {}

    __device__ void store() const {
        SequenceParams const& sequences = params_.sequences;
        int batch = blockIdx.x;
        int row_before = 0;
#pragma unroll 1
        for (int first = 0; first < sequences.batch; first += 32) {
            int const row = first_rows(sequences, first, row_before);
#pragma unroll 1
            for (; batch < min(first + 32, sequences.batch); batch += gridDim.x) {
                int const offset_q = __shfl_sync(0xffffffff, row, batch - first);
                auto const sequence = SequenceWork<Config>::read(params_, batch, offset_q);
                of_sequence(sequence);
                if constexpr (Config::kAppend) {
                    NewKeys<Config>::store_others(params_, batch, sequence);
                }
            }
        }
        if (sequences.cu_seqlens_q != nullptr) {
            outside(first_row(sequences, 0, 0), first_row(sequences, sequences.batch, row_before));
        }
    }

  private:
    __device__ static int warp() { return threadIdx.x / 32; }

    __device__ void of_sequence(SequenceWork<Config> const& sequence) const {
        SeqlenInfo const& info = sequence.info;
        int const first = sequence.tiles == 0 ? 0 : sequence.queries;
        int const rows = (info.rows_q - first) * params_.heads_q;
        for (int i = warp(); i < rows; i += Config::kWarps) {
            int const query = first + i / params_.heads_q;
            int const head = i % params_.heads_q;
            bool const sink = query < sequence.queries && params_.scores.sinks != nullptr;
            store_row(info.batch_q, info.offset_q + int64_t{query}, head,
                      sink ? params_.scores.sinks[head] : -INFINITY);
        }
    }

    // Rows of packed Q before `begin`, where the first sequence begins, and from `end` on.
    __device__ void outside(int begin, int end) const {
        int64_t const count =
            int64_t{begin + static_cast<int>(params_.sequences.total_q) - end} * params_.heads_q;
        for (int64_t i = int64_t{blockIdx.x} * Config::kWarps + warp(); i < count;
             i += int64_t{gridDim.x} * Config::kWarps) {
            int const row = static_cast<int>(i / params_.heads_q);
            store_row(0, row < begin ? row : row - begin + end, static_cast<int>(i % params_.heads_q),
                      -INFINITY);
        }
    }

    __device__ void store_row(int batch, int64_t row, int head, float row_lse) const {
        uint32_t* const o = reinterpret_cast<uint32_t*>(
            static_cast<uint16_t*>(params_.o.ptr) + batch * params_.o.batch_stride +
            row * params_.o.row_stride + head * params_.o.head_stride);
        int const lane = threadIdx.x % 32;
        for (int pair = lane; pair < params_.head_dim_v / 2; pair += 32) {
            o[pair] = 0;
        }
        RowRef const& lse = params_.lse;
        if (lane == 0 && lse.ptr != nullptr) {
            lse.ptr[batch * lse.batch_stride + head * lse.head_stride + row] = row_lse;
        }
    }

    DecodeParams const& params_;
};

}  // namespace flash8
