// What get_scheduler_metadata leaves for the decode kernels of a step: (batch + 1) words. The first one says
// for which tiles, word b + 1 how many pieces the sequences up to b have. One launch writes them
// (schedule.cu); without them each warp counts for itself, 32 sequences at a time (work.cuh).
//
// The decode kernel believes none of them. Its threads count one sequence each, all at once, and compare: the
// table is what they say it is if it begins with 0 and every difference is that sequence's. Otherwise, and it
// may be stale, of another call or garbage, the warps count for themselves. Whoever takes the table has the
// share that he would have counted, so CTAs need not decide alike for every piece to be somebody's.

#pragma once

#include "work.cuh"

namespace flash8 {

// Zero, with which tables begin that nobody has filled, is the tag of no tile.
__host__ __device__ constexpr int scheduler_metadata_tag(int block_m, int block_n) {
    constexpr int kVersion = 1;
    return kVersion << 16 | block_m << 8 | block_n;
}

template <class Config>
class SchedulerMetadata {
    static constexpr int kMostPieces = 1 << 30;

  public:
    __device__ explicit SchedulerMetadata(DecodeParams const& params)
        : params_(params), pieces_up_to_(params.scheduler_metadata + 1) {}

    // By all threads of the CTA, which meet: its share in shared memory, if the table is right.
    __device__ bool find(Share& share) const {
        int const batch = params_.sequences.batch;
        int const all = batch == 0 ? 0 : pieces_up_to_[batch - 1];
        bool agrees =
            params_.scheduler_metadata[0] == scheduler_metadata_tag(Config::kBlockM, Config::kBlockN) &&
            all >= 0 && all <= kMostPieces;
        Share own = Shares<Config>::of_pieces(params_, agrees ? all : 0);
        for (int b = threadIdx.x; agrees && b < batch; b += Config::kThreads) {
            int const row = row_of(b);
            // Where rows ascend, no sequence begins later than it says (first_row).
            agrees = b == 0 || row >= row_of(b - 1);
            int const begin = b == 0 ? 0 : pieces_up_to_[b - 1];
            int const end = pieces_up_to_[b];
            // Wraps around; right tables do not.
            unsigned const pieces = static_cast<unsigned>(end) - static_cast<unsigned>(begin);
            SequenceWork<Config> const sequence = SequenceWork<Config>::read(params_, b, row);
            agrees = agrees && pieces == static_cast<unsigned>(sequence.all_pieces(params_));
            if (begin <= own.begin && own.begin < end) {
                own.batch = b;
                own.batch_begin = begin;
                own.batch_row = row;
            }
        }
        // Lane 0's, which is every lane's. Of a barrier's result ptxas does not know that: it would keep the
        // addresses of the loop over tiles in each lane.
        if (__shfl_sync(0xffffffff, __syncthreads_and(agrees), 0) == 0) {
            return false;
        }
        // One thread has found the first piece, unless the CTA has none.
        bool const without_pieces = own.begin >= own.end;
        if (without_pieces ? threadIdx.x == 0 : own.batch >= 0) {
            share = own;
        }
        __syncthreads();
        return true;
    }

  private:
    __device__ int row_of(int batch) const { return first_row(params_.sequences, batch, 0); }

    DecodeParams const& params_;
    std::int32_t const* pieces_up_to_;
};

// By all threads of the CTA.
template <class Config>
__device__ __forceinline__ Share find_share(DecodeParams const& params, Share& stored) {
    if (params.scheduler_metadata != nullptr && SchedulerMetadata<Config>(params).find(stored)) {
        return stored;
    }
    return Shares<Config>::of_cta(params);
}

}  // namespace flash8
