#include <algorithm>
#include <cstring>

#include "address.h"
#include "bulk_copy.h"
#include "checker.h"
#include "errors.h"
#include "global_shadow.h"
#include "launch.h"
#include "mbarrier.h"
#include "scheduler.h"

namespace sim {
namespace {

// Visits the elements of a row that lie inside the tensor, as (first element, count) of the box row.
struct Span {
    uint32_t first, count;
};
Span inside(const TensorMap& map, const BoxRow& row, uint32_t inner) {
    if (!row.inside) {
        return {0, 0};
    }
    const int64_t step = map.element_strides[0];
    const int64_t extent = int64_t{map.last[0]} + 1;
    const int64_t begin = row.first >= 0 ? 0 : (-row.first + step - 1) / step;
    const int64_t end = row.first >= extent ? 0 : (extent - row.first + step - 1) / step;
    const int64_t stop = std::min<int64_t>(end, inner);
    return begin < stop ? Span{static_cast<uint32_t>(begin), static_cast<uint32_t>(stop - begin)}
                        : Span{0, 0};
}

void fill_outside(const TensorMap& map, std::vector<uint8_t>& box) {
    std::fill(box.begin(), box.end(), uint8_t{0});
    if (map.nan_fill == 0) {
        return;
    }
    // The fill constant of OOB_FILL_NAN_REQUEST_ZERO_FMA is a NaN of the element type.
    for (size_t i = 0; i + map.element_bytes <= box.size(); i += map.element_bytes) {
        uint8_t nan[8] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
        nan[map.element_bytes - 1] = 0x7f;
        std::memcpy(&box[i], nan, map.element_bytes);
    }
}

uint32_t box_address(const TensorMap& map, bool tiled, uint32_t offset, uint32_t at) {
    const uint32_t plain = kSharedBase + offset + at;
    return (tiled ? swizzle_address(plain, map.swizzle) : plain) - kSharedBase;
}

bool checks_shared(const Cluster& cluster) {
    return cluster.launch->config.check_races || cluster.launch->config.check_uninitialized;
}

}  // namespace

void TransferIn::read_global(Cluster& cluster, uint64_t from, uint64_t count) const {
    const Destination& first = destinations[0];
    check_global(cluster,
                 {mbarrier_at(*first.cta, first.barrier, line).agent, static_cast<uint32_t>(first.phase) + 1,
                  access, true, &order},
                 from, count);
}

void TransferIn::gather(Cluster& cluster, std::vector<uint8_t>& box) const {
    box.resize(bytes);
    if (shared_source != nullptr) {
        std::memcpy(box.data(), shared_source->shared.data() + shared_source_offset, bytes);
        return;
    }
    if (!tiled) {
        read_global(cluster, plain_source, bytes);
        std::memcpy(box.data(), reinterpret_cast<const uint8_t*>(plain_source), bytes);
        return;
    }
    fill_outside(map, box);
    const BoxShape shape = box_shape(map);
    const uint32_t step = map.element_strides[0] * map.element_bytes;
    for (const BoxRow& row : box_rows(map, coordinates)) {
        const Span span = inside(map, row, shape.inner);
        if (span.count == 0) {
            continue;
        }
        uint8_t* to = box.data() + row.box_offset + span.first * map.element_bytes;
        const uint64_t from = row.global + uint64_t{span.first} * step;
        const uint8_t* host = resolve_global(
            cluster, from, uint64_t{span.count - 1} * step + map.element_bytes, line, "a tensor load");
        read_global(cluster, from, uint64_t{span.count - 1} * step + map.element_bytes);
        if (map.element_strides[0] == 1) {
            std::memcpy(to, host, span.count * map.element_bytes);
            continue;
        }
        for (uint32_t i = 0; i < span.count; ++i) {
            std::memcpy(to + i * map.element_bytes, host + i * step, map.element_bytes);
        }
    }
}

void TransferIn::deliver(Cluster& cluster, const Destination& to, const std::vector<uint8_t>& box) const {
    if (to.cta->warps_alive == 0) {
        throw SimError(ErrorKind::kOutOfBounds,
                       format("a transfer reaches CTA rank %u, which has exited", to.cta->rank), line);
    }
    const Mbarrier& barrier = mbarrier_at(*to.cta, to.barrier, line);
    if (checks_shared(cluster)) {
        check_write({&cluster, to.cta, to.offset, bytes, barrier.agent, static_cast<uint32_t>(to.phase) + 1,
                     &order.clock, &order.shared_proxy, line});
    }
    uint8_t* shared = to.cta->shared.data();
    if (reduces) {
        const uint32_t size = bytes_of(reduce_type);
        for (uint32_t at = 0; at < bytes; at += size) {
            uint64_t old = 0, value = 0;
            std::memcpy(&old, shared + to.offset + at, size);
            std::memcpy(&value, box.data() + at, size);
            const uint64_t fresh = reduce_value(reduce_op, reduce_type, old, value);
            std::memcpy(shared + to.offset + at, &fresh, size);
        }
    } else if (!tiled || map.swizzle == 0) {
        std::memcpy(shared + to.offset, box.data(), bytes);
    } else {
        for (uint32_t at = 0; at < bytes; at += 16) {
            std::memcpy(shared + box_address(map, true, to.offset, at), box.data() + at,
                        std::min(16u, bytes - at));
        }
    }
    complete_transfer(*to.cta, to.barrier, bytes, to.phase, order, line);
}

bool TransferIn::perform(Cluster& cluster) {
    if (shared_source != nullptr && checks_shared(cluster)) {
        check_read({&cluster, shared_source, shared_source_offset, bytes,
                    mbarrier_at(*destinations[0].cta, destinations[0].barrier, line).agent,
                    static_cast<uint32_t>(destinations[0].phase) + 1, &order.clock, &order.shared_proxy,
                    line});
    }
    std::vector<uint8_t> box;
    gather(cluster, box);
    for (const Destination& to : destinations) {
        deliver(cluster, to, box);
    }
    return true;
}

void TransferOut::read(Cluster& cluster) {
    if (checks_shared(cluster)) {
        check_read(
            {&cluster, cta, offset, bytes, agent, group_number, &order.clock, &order.shared_proxy, line});
    }
    box_.resize(bytes);
    const uint8_t* shared = cta->shared.data();
    if (!tiled || map.swizzle == 0) {
        std::memcpy(box_.data(), shared + offset, bytes);
        return;
    }
    for (uint32_t at = 0; at < bytes; at += 16) {
        std::memcpy(box_.data() + at, shared + box_address(map, true, offset, at), std::min(16u, bytes - at));
    }
}

void TransferOut::write_run(Cluster& cluster, uint64_t to, const uint8_t* from, uint32_t count) {
    uint8_t* host = resolve_global(cluster, to, count, line, "a bulk store");
    check_global(cluster, {agent + kBulkWrites - kBulkReads, group_number, access, true, &order}, to, count);
    if (!reduces) {
        std::memcpy(host, from, count);
        return;
    }
    const std::lock_guard<std::mutex> lock(global_atomics());
    const uint32_t size = bytes_of(reduce_type);
    if (reduce_type == Type::kF32 && reduce_op == ReduceOp::kAdd) {
        for (uint32_t at = 0; at < count; at += 4) {
            float sum, value;
            std::memcpy(&sum, host + at, 4);
            std::memcpy(&value, from + at, 4);
            sum += value;
            std::memcpy(host + at, &sum, 4);
        }
        return;
    }
    for (uint32_t at = 0; at < count; at += size) {
        uint64_t old = 0, value = 0;
        std::memcpy(&old, host + at, size);
        std::memcpy(&value, from + at, size);
        const uint64_t fresh = reduce_value(reduce_op, reduce_type, old, value);
        std::memcpy(host + at, &fresh, size);
    }
}

void TransferOut::write(Cluster& cluster) {
    if (!tiled) {
        write_run(cluster, global, box_.data(), bytes);
        return;
    }
    const BoxShape shape = box_shape(map);
    const uint32_t step = map.element_strides[0] * map.element_bytes;
    for (const BoxRow& row : box_rows(map, coordinates)) {
        const Span span = inside(map, row, shape.inner);
        if (span.count == 0) {
            continue;
        }
        const uint8_t* from = box_.data() + row.box_offset + span.first * map.element_bytes;
        const uint64_t to = row.global + uint64_t{span.first} * step;
        if (map.element_strides[0] == 1) {
            write_run(cluster, to, from, span.count * map.element_bytes);
            continue;
        }
        for (uint32_t i = 0; i < span.count; ++i) {
            write_run(cluster, to + uint64_t{i} * step, from + i * map.element_bytes, map.element_bytes);
        }
    }
}

// When the write may land: at once, or so much later that other CTAs have finished whole tiles.
void TransferOut::hold_back(const Cluster& cluster, uint64_t dice) {
    constexpr uint64_t kLongest = 12;  // of turns, as a power of two
    const uint64_t turns = uint64_t{1} << dice % (kLongest + 1);
    due = cluster.turn + (dice >> 8) % turns;
}

bool TransferOut::perform(Cluster& cluster) {
    if (!read_done_) {
        read(cluster);
        read_done_ = true;
        --group->pending_reads;
        if (cluster.launch->adversarial && !completes_at_issue(cluster)) {
            hold_back(cluster, cluster.random());
        }
        return false;
    }
    write(cluster);
    --group->pending_writes;
    return true;
}

}  // namespace sim
