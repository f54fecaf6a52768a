// Asynchronous bulk copies: decoding and issue in bulk_copy.cpp, the movement of bytes here.
#pragma once

#include "async_copy.h"
#include "machine.h"
#include "reduction.h"
#include "tensor_map.h"

namespace sim {

// What both directions have: a reduction perhaps, and a tensor map or a plain run of bytes.
class Transfer : public AsyncItem {
  public:
    uint32_t bytes = 0;
    bool reduces = false;
    ReduceOp reduce_op = ReduceOp::kAdd;
    Type reduce_type = Type::kNone;
    bool tiled = false;
    TensorMap map;
    int32_t coordinates[5] = {};
    Order order;
    uint16_t access = 0;  // the instruction among those that may touch global memory
};

bool is_bulk_store(const Op& op);
bool is_bulk_reduction(const Op& op);

// Global (or another CTA's shared) memory into shared memory; announces itself on an mbarrier.
class TransferIn : public Transfer {
  public:
    bool perform(Cluster& cluster) override;
    std::string describe() const override { return "a load into shared memory"; }

    struct Destination {
        Cta* cta;
        uint32_t offset, barrier;  // from kSharedBase
        uint64_t phase;            // of the barrier at the issue
    };
    std::vector<Destination> destinations;
    uint64_t plain_source = 0;     // bulk: contiguous
    Cta* shared_source = nullptr;  // bulk from shared memory
    uint32_t shared_source_offset = 0;

  private:
    void read_global(Cluster& cluster, uint64_t from, uint64_t count) const;
    void gather(Cluster& cluster, std::vector<uint8_t>& box) const;
    void deliver(Cluster& cluster, const Destination& to, const std::vector<uint8_t>& box) const;
};

// Shared memory to global, in two steps: the read, later the write.
class TransferOut : public Transfer {
  public:
    bool perform(Cluster& cluster) override;
    std::string describe() const override { return "a store from shared memory"; }

    uint32_t offset = 0;
    uint64_t global = 0;
    std::shared_ptr<BulkGroup> group;
    uint32_t agent = 0, group_number = 0;

  private:
    void read(Cluster& cluster);
    void hold_back(const Cluster& cluster, uint64_t dice);
    void write(Cluster& cluster);
    void write_run(Cluster& cluster, uint64_t to, const uint8_t* from, uint32_t count);

    bool read_done_ = false;
    std::vector<uint8_t> box_;
};

}  // namespace sim
