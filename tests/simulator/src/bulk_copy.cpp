// cp.async.bulk and cp.async.bulk.tensor: issue and bulk groups.
#include "bulk_instruction.h"

#include <algorithm>

#include "address.h"
#include "checker.h"
#include "decoder.h"
#include "errors.h"
#include "lanes.h"
#include "launch.h"
#include "mbarrier.h"
#include "scheduler.h"

namespace sim {
namespace {

uint64_t address_at(const Warp& w, const uint32_t* entry, int lane) {
    const uint64_t base =
        entry[2] != 0 ? source<uint64_t>(w, entry[0])[lane] : source<uint32_t>(w, entry[0])[lane];
    return base + static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(entry[1])));
}

uint32_t shared_address(uint64_t address) {
    return static_cast<uint32_t>(address >= kSharedWindow ? address - kSharedWindow : address);
}

void require_aligned(uint64_t address, uint32_t alignment, const char* what, int line) {
    if (address % alignment != 0) {
        throw SimError(ErrorKind::kMisaligned,
                       format("%s 0x%llx is not aligned to %u bytes", what,
                              static_cast<unsigned long long>(address), alignment),
                       line);
    }
}

void fill_tensor(Warp& w, const Op& op, const uint32_t* places, int lane, Transfer& item) {
    Cluster& cluster = *w.cta->cluster;
    const uint64_t at = address_at(w, places + kMap, lane);
    const uint8_t* pointer = resolve_global(cluster, at, sizeof(TensorMap), op.line, "reading a tensor map");
    item.map = tensor_map_at(pointer, op.code2, op.line);
    for (uint32_t i = 0; i < op.code2; ++i) {
        item.coordinates[i] = source<int32_t>(w, places[kCoordinates + i])[lane];
    }
    item.bytes = box_shape(item.map).bytes;
}

// What does not depend on the direction.
template <class Item>
std::unique_ptr<Item> start(Warp& w, const Op& op, const uint32_t* places, int lane) {
    auto item = std::make_unique<Item>();
    item->cta = w.cta;
    item->warp_index = w.index;
    item->line = op.line;
    item->issue_time = w.time;
    item->access = op.access;
    item->reduces = (op.target & kReduces) != 0;
    item->reduce_op = static_cast<ReduceOp>(op.target2 >> 8);
    item->reduce_type = static_cast<Type>(op.target2 & 0xff);
    item->tiled = (op.target & kTiled) != 0;
    if (item->tiled) {
        fill_tensor(w, op, places, lane, *item);
    } else {
        item->bytes = source<uint32_t>(w, places[kSize])[lane];
        require_aligned(item->bytes, 16, "the size of a bulk copy,", op.line);
    }
    return item;
}

template <class Item>
void hand_over(Warp& w, int lane, BytePath path, std::unique_ptr<Item> item) {
    Cluster& cluster = *w.cta->cluster;
    if (cluster.launch->config.check_races) {
        fork(w, 1u << lane, item->order);
    }
    count_bytes(cluster, path, item->bytes);
    submit(cluster, std::move(item));
}

uint32_t target_ranks(const Warp& w, const Op& op, const uint32_t* places, int lane, uint32_t to) {
    if ((op.target & kMulticast) == 0) {
        return 1u << (to >> kRankShift);
    }
    const size_t ctas = w.cta->cluster->ctas.size();
    const uint32_t targets = source<uint16_t>(w, places[kMask])[lane];
    if (targets == 0 || targets >> ctas != 0) {
        throw SimError(
            ErrorKind::kInvalidValue,
            format("multicast mask 0x%x names CTAs that a cluster of %zu does not have", targets, ctas),
            op.line);
    }
    return targets;
}

TransferIn::Destination destination_in(Warp& w, const Op& op, uint32_t to, uint32_t barrier, uint32_t bytes) {
    TransferIn::Destination destination{};
    destination.cta = &shared_target(w, to, bytes, true, op.line, &destination.offset);
    Cta& announced = shared_target(w, barrier, 8, true, op.line, &destination.barrier);
    if (&announced != destination.cta) {
        throw SimError(ErrorKind::kBarrier, "the mbarrier is in another CTA than the destination", op.line);
    }
    const Mbarrier& object = mbarrier_at(announced, destination.barrier, op.line);
    if (w.cta->cluster->launch->config.check_races) {
        check_init(w, announced, destination.barrier, object, true, op.line);
    }
    destination.phase = object.phase;
    return destination;
}

void issue_in(Warp& w, const Op& op, const uint32_t* places, int lane) {
    Cluster& cluster = *w.cta->cluster;
    auto item = start<TransferIn>(w, op, places, lane);
    const uint32_t to = shared_address(address_at(w, places + kTo, lane));
    require_aligned(to, item->tiled ? 128 : 16, "the shared destination", op.line);
    if (op.code == kSharedToShared) {
        const uint32_t from = shared_address(address_at(w, places + kFrom, lane));
        require_aligned(from, 16, "the shared source", op.line);
        item->shared_source =
            &shared_target(w, from, item->bytes, false, op.line, &item->shared_source_offset);
    } else if (!item->tiled) {
        const uint64_t from = address_at(w, places + kFrom, lane);
        require_aligned(from, 16, "the global source", op.line);
        resolve_global(cluster, from, item->bytes, op.line, "a bulk load");
        item->plain_source = from;
    }
    const uint32_t barrier = shared_address(address_at(w, places + kBarrier, lane));
    const uint32_t targets = target_ranks(w, op, places, lane, to);
    const bool multicast = (op.target & kMulticast) != 0;
    const auto in_cta = [&](uint32_t address, uint32_t rank) {
        return multicast ? (address & ((1u << kRankShift) - 1)) | rank << kRankShift : address;
    };
    for (uint32_t rank = 0; rank < cluster.ctas.size(); ++rank) {
        if (((targets >> rank) & 1) != 0) {
            item->destinations.push_back(
                destination_in(w, op, in_cta(to, rank), in_cta(barrier, rank), item->bytes));
        }
    }
    const BytePath path = item->tiled ? BytePath::kTensorLoad : BytePath::kBulkLoad;
    hand_over(w, lane, path, std::move(item));
}

void issue_out(Warp& w, const Op& op, const uint32_t* places, int lane) {
    auto item = start<TransferOut>(w, op, places, lane);
    if (item->tiled && item->reduces) {
        item->reduce_type = reduction_type(item->map, op.line);
    } else if (!item->tiled) {
        item->global = address_at(w, places + kTo, lane);
        require_aligned(item->global, 16, "the global destination", op.line);
        resolve_global(*w.cta->cluster, item->global, item->bytes, op.line, "a bulk store");
    }
    const uint32_t from = shared_address(address_at(w, places + kFrom, lane));
    require_aligned(from, item->tiled ? 128 : 16, "the shared source", op.line);
    shared_target(w, from, item->bytes, false, op.line, &item->offset);
    if (!w.open_bulk_group) {
        w.open_bulk_group = std::make_shared<BulkGroup>();
    }
    item->group = w.open_bulk_group;
    item->group->mask |= 1u << lane;
    ++item->group->pending_reads;
    ++item->group->pending_writes;
    w.last_bulk_store_line = op.line;
    item->agent = agent_of(w, kBulkReads);
    item->group_number = w.bulk_groups_committed + 1;
    const BytePath path = !item->tiled    ? (item->reduces ? BytePath::kBulkReduce : BytePath::kBulkStore)
                          : item->reduces ? BytePath::kTensorReduce
                                          : BytePath::kTensorStore;
    hand_over(w, lane, path, std::move(item));
}

}  // namespace

Step issue_bulk(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t* places = w.program->lists.data() + op.list;
    for (int i = 0; i < kLanes; ++i) {
        if (!in_mask(mask, i)) {
            continue;
        }
        if (op.code == kStore) {
            issue_out(w, op, places, i);
        } else {
            issue_in(w, op, places, i);
        }
    }
    return Step::kNext;
}

Step commit_bulk(Warp& w, const Op&, uint32_t mask) {
    if (!w.open_bulk_group) {
        w.open_bulk_group = std::make_shared<BulkGroup>();
    }
    w.open_bulk_group->mask |= mask;
    w.bulk_groups.push_back(std::move(w.open_bulk_group));
    w.open_bulk_group = nullptr;
    ++w.bulk_groups_committed;
    return Step::kNext;
}

Step wait_bulk(Warp& w, const Op& op, uint32_t mask) {
    const uint32_t allowed = static_cast<uint32_t>(op.imm);
    const bool reads_only = op.code != 0;
    if (!bulk_groups_done(w, mask, allowed, reads_only)) {
        Wait& state = w.fragment().wait;
        state = Wait{};
        state.kind = WaitKind::kBulkGroup;
        state.address = allowed;
        state.parity = reads_only;
        return Step::kBlocked;
    }
    w.fragment().wait = Wait{};
    const uint32_t covered = w.bulk_groups_committed > allowed ? w.bulk_groups_committed - allowed : 0;
    // A lane that never issued a store has nothing to wait for and learns nothing.
    const bool owner = std::any_of(w.bulk_groups.begin(), w.bulk_groups.end(),
                                   [&](const auto& g) { return (g->mask & mask) != 0; });
    if (owner) {
        w.bulk_reads_waited = std::max(w.bulk_reads_waited, covered);
        if (w.cta->cluster->launch->config.check_races) {
            set_clock(w.order.clock, agent_of(w, kBulkReads), covered);
            if (!reads_only) {
                set_clock(w.order.clock, agent_of(w, kBulkWrites), covered);
            }
        }
    }
    while (w.bulk_groups.size() > allowed && w.bulk_groups.front()->pending_writes == 0) {
        w.bulk_groups.erase(w.bulk_groups.begin());
    }
    return Step::kNext;
}

bool is_bulk_store(const Op& op) {
    return op.run == issue_bulk && op.code == kStore;
}
bool is_bulk_reduction(const Op& op) {
    return is_bulk_store(op) && (op.target & kReduces) != 0;
}

bool bulk_groups_done(const Warp& w, uint32_t lanes, uint32_t allowed, bool reads_only) {
    uint32_t left = allowed;
    for (size_t i = w.bulk_groups.size(); i-- > 0;) {
        const BulkGroup& group = *w.bulk_groups[i];
        if ((group.mask & lanes) == 0) {
            continue;
        }
        if (left != 0) {
            --left;
        } else if (group.pending_reads != 0 || (!reads_only && group.pending_writes != 0)) {
            return false;
        }
    }
    return true;
}

}  // namespace sim
