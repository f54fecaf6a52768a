// Loads tiles of keys from a paged cache.
//
// A tile is of boxes that no page boundary cuts: box_rows divides the page size and kBlockN. By the whole
// producer warp: each lane looks up the page of one box, a tile ahead, and the first lane issues TMA with
// the page's number as a coordinate. A box of which no query of the tile sees a key, or whose page does not
// exist, arrives as zeros: TMA takes any coordinate. So a stage always gets all of its bytes.

#pragma once

#include "../attention/pages.cuh"
#include "config.cuh"

namespace flash8 {

// The first key lies where a box begins: the padding in that box is counted with the keys, and hidden by the
// mask.
struct PaddedSeqlenInfo : SeqlenInfo {
    int hidden_k;  // how many of the keys are padding
};

// The sequence of a tile.
template <class Config>
__device__ __forceinline__ auto sequence_of(ForwardParams const& params, WorkTile const& tile) {
    SeqlenInfo const info = SeqlenInfo::read(params.sequences, tile.batch, tile.offset_q);
    if constexpr (Config::kPages == PageChoice::kPaddedPages) {
        PaddedSeqlenInfo padded{info, info.offset_k % params.pages.box_rows};
        padded.offset_k -= padded.hidden_k;
        padded.seqlen_k += padded.hidden_k;
        return padded;
    } else {
        return info;
    }
}

template <class Config>
class PageLoader {
    using Element = typename Config::Element;
    static constexpr int kBlockN = Config::kBlockN;
    static constexpr int kLeastBoxRows = 8;  // after which the swizzle repeats
    static_assert(kBlockN / kLeastBoxRows <= 32, "a lane looks up one box");

  public:
    // For the tile of queries that sees `blocks`.
    __device__ PageLoader(ForwardParams const& params, SeqlenInfo const& info, KeyBlocks const& blocks,
                          int head)
        : params_(params),
          table_row_(info.batch_k),
          offset_(info.offset_k),
          first_seen_(info.offset_k + blocks.first_key),
          end_seen_(info.offset_k + blocks.end_key),
          head_(head) {}

    // The place of this lane's box of a block. Nothing waits for the entry of the table before `load`.
    __device__ __forceinline__ KeyPlace look_up(int n_block) const {
        int const rows = params_.pages.box_rows;
        int const key = static_cast<int>(threadIdx.x % 32) * rows;
        int const position = offset_ + n_block * kBlockN + key;
        bool const seen = key < kBlockN && position < end_seen_ && position + rows > first_seen_;
        return look_up_page(params_.pages, table_row_, position, seen);
    }

    // Fills a stage with the block whose boxes are at the lanes' places.
    template <int kPanel, int kColumns>
    __device__ __forceinline__ void load(Pipeline<Config::kStages>& pipeline,
                                         PipelineState<Config::kStages> const& state, Element* stages,
                                         TensorMap const* map, KeyPlace const& place) const {
        constexpr int kElements = kBlockN * kColumns;
        bool const leader = threadIdx.x % 32 == 0;
        uint64_t* const full = &pipeline.full[state.stage];
        Element* const stage = stages + state.stage * kElements;
        if (leader) {
            pipeline.acquire(state, kElements * sizeof(Element));
        }
        int const rows = params_.pages.box_rows;
#pragma unroll 1
        for (int box = 0, first = 0; first < kBlockN; ++box, first += rows) {
            int const box_page = __shfl_sync(0xffffffff, place.page, box);
            int const box_row = __shfl_sync(0xffffffff, place.row, box);
            if (leader) {
#pragma unroll
                for (int column = 0; column < kColumns; column += kPanel) {
                    ptx::tma_load_4d(stage + column * kBlockN + first * kPanel, map, full, column, box_row,
                                     head_, box_page);
                }
            }
        }
    }

  private:
    ForwardParams const& params_;
    int table_row_;
    int offset_;      // where the first block begins
    int first_seen_;  // keys [first_seen_, end_seen_) of the cache row are those that some query sees
    int end_seen_;
    int head_;
};

}  // namespace flash8
