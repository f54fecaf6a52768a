// The state of a running launch: clusters of CTAs of warps, all plain data.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "config.h"
#include "memory_sync.h"
#include "order.h"
#include "program.h"
#include "shared_counts.h"
#include "shared_shadow.h"
#include "statistics.h"
#include "timeline.h"

namespace sim {

struct Cta;
struct Cluster;
struct Launch;
struct Warpgroup;
struct MemoryRange;

enum class AgentKind : uint8_t {
    kWarp,
    kCpAsync,
    kBulkRead,
    kBulkWrite,
    kInits,
    kReads,
    kLane,
    kWgmma,
    kTransfer,
    kAsyncStore  // st.async and red.async that an mbarrier announces
};
using LaneAgents = std::array<uint32_t, kLanes>;

// Whatever makes accesses of its own time, for the race check.
struct AgentInfo {
    AgentKind kind;
    uint32_t rank;            // of the CTA
    uint32_t index;           // warp, warpgroup, or the barrier's address
    const LaneAgents* lanes;  // of a warp
};

constexpr uint32_t kSharedBase = 1024;                     // first shared address a kernel sees, as on Hopper
constexpr uint32_t kRankShift = 24;                        // the CTA's rank in a shared::cluster address
constexpr uint64_t kSharedWindow = 0x00A0000000000000ull;  // generic window of shared::cluster
constexpr uint64_t kLocalWindow = 0x00B0000000000000ull;
constexpr uint32_t kMaxSharedBytes = 227 * 1024;

struct Dim3 {
    uint32_t x = 1, y = 1, z = 1;
    uint64_t count() const { return uint64_t{x} * y * z; }
};

enum class WaitKind : uint8_t {
    kNone,
    kMbarrier,
    kNamedBarrier,
    kClusterBarrier,
    kWgmma,
    kBulkGroup,
    kCpAsync,
    kWarpSync,
    kRegisters,
    kEarlierGrids
};

struct Wait {
    WaitKind kind = WaitKind::kNone;
    uint32_t address = 0;  // mbarrier: shared::cluster address; named barrier: id
    uint64_t phase = 0;    // what must change: phase or generation, or a group count
    uint32_t parity = 0;
    uint32_t member_mask = 0;  // warp sync
    bool timed_out = false;    // try_wait gives up once
};

// Lanes of a warp that stand at one pc. A warp that has not diverged has one.
struct Fragment {
    uint32_t mask = 0;
    uint32_t pc = 0;
    int join = -1;
    Wait wait;
};

// Where the lanes of a divergent branch meet again: its immediate post-dominator.
struct Join {
    uint32_t pc = 0;
    uint32_t pending = 0;
    uint32_t arrived = 0;
    int parent = -1;
    bool live = false;
};

// cp.async of one instruction: up to 32 copies.
struct CpAsyncOp {
    uint32_t mask = 0;
    uint32_t sequence = 0;  // per warp, from 1
    bool done = false;
};
struct CpAsyncGroup {
    uint32_t mask = 0;
    std::vector<std::shared_ptr<CpAsyncOp>> operations;
};

struct BulkGroup {
    uint32_t mask = 0;
    uint32_t pending_reads = 0, pending_writes = 0;
};

// A move of an accumulator in flight, or a wgmma, in the order the warp issued them.
struct WgmmaStep {
    bool is_copy = false;
    uint32_t item = 0;  // wgmma: its index in the warpgroup
    uint32_t from = 0, to = 0, bytes = 0, mask = 0;
};

struct Warp {
    uint8_t* base[2] = {nullptr, nullptr};  // registers, constants
    uint32_t* preds = nullptr;
    const Program* program = nullptr;
    Cta* cta = nullptr;
    uint32_t index = 0;  // in the CTA
    uint32_t agent = 0;  // in the cluster, for vector clocks
    uint32_t alive = 0;
    int current = 0;  // fragment that runs
    std::vector<Fragment> fragments;
    std::vector<Join> joins;
    Warpgroup* warpgroup = nullptr;
    uint32_t registers_per_thread = 0;

    std::vector<uint8_t> register_storage;
    std::vector<uint32_t> pred_storage;
    std::vector<uint8_t> local_storage;

    std::vector<CpAsyncGroup> cp_async_groups;              // committed, oldest first
    std::vector<std::shared_ptr<CpAsyncOp>> cp_async_open;  // not committed yet
    uint32_t cp_async_sequence = 0;
    std::vector<std::shared_ptr<BulkGroup>> bulk_groups;
    std::shared_ptr<BulkGroup> open_bulk_group;
    uint32_t bulk_groups_committed = 0;  // since the launch
    uint32_t bulk_reads_waited = 0;      // groups a wait_group has covered
    int last_bulk_store_line = 0;
    bool cluster_arrived = false;
    uint64_t cluster_generation = 0;
    uint64_t cluster_arrival_time = 0;

    // wgmma
    std::vector<WgmmaStep> wgmma_steps;
    size_t wgmma_steps_done = 0;
    uint32_t wgmma_issued = 0;  // items
    uint32_t wgmma_committed_items = 0;
    uint32_t wgmma_groups = 0;         // groups committed
    std::vector<uint32_t> group_ends;  // item count at each commit

    // checker: per 64-byte register slot
    std::vector<uint32_t> defined;  // lanes that were written
    std::vector<uint32_t> pred_defined;
    std::vector<uint32_t> in_flight;   // 1 + wgmma item that will write the slot
    std::vector<uint32_t> being_read;  // 1 + wgmma item that reads the slot
    std::vector<uint64_t> written_at;  // instruction number of the last write that a fence must follow
    uint64_t last_wgmma_fence = 0;
    bool any_in_flight = false;
    Order order;
    WarpSync sync;
    std::shared_ptr<LaneAgents> lane_agents;  // of lanes that released something by themselves, else kNone
    uint32_t ordered_time = 0;                // of its own clock, when its lanes last met in order
    uint32_t loaded_time = 0;                 // and when a meeting last completed their loads
    bool loaded_since = false;
    uint32_t inits = 0;  // mbarriers that it has initialized

    uint64_t executed = 0;  // warp instructions
    uint64_t time = 0;      // logical, see timeline.h
    OpCounts counts{};
    RunStart run_start;

    Fragment& fragment() { return fragments[static_cast<size_t>(current)]; }
};

struct NamedBarrier {
    uint32_t expected = 0;  // threads; 0: every warp that has not exited
    uint32_t arrived = 0;
    uint32_t votes = 0, done_votes = 0;  // bar.red: threads whose predicate holds
    uint32_t voters = 0, done_voters = 0;
    uint64_t generation = 0;
    Order order, done;  // of those that arrived, and of the last completed generation
    uint64_t time = 0, done_time = 0;
};

struct Mbarrier {
    bool live = false;
    uint32_t expected = 0;
    int32_t pending = 0;
    int64_t transaction = 0;
    uint64_t phase = 0;            // completed phases
    uint32_t agent = kNone;        // async writes that this barrier announces
    uint32_t store_agent = kNone;  // those of st.async and red.async, in the generic proxy
    // What arrivals make known: to a wait with the scope of the CTA, and of the cluster. Of the running
    // phase, and of the completed ones.
    Order cta_order, cluster_order;
    Order cta_done, cluster_done;
    uint64_t time = 0, done_time = 0;
    int line = 0;  // of its init
    uint32_t init_agent = kNone, init_time = 0, init_lane = 0;
    uint32_t init_number = 0;  // among those of its warp
};

struct WgmmaItem {
    const Op* op = nullptr;
    uint64_t a = 0, b = 0;  // descriptors
    bool scale_d = false;
    uint32_t issued = 0;  // bit per warp of the warpgroup
    uint32_t done = 0;
    uint32_t group = 0;
    bool checked = false;
    uint64_t begin = 0, end = 0;  // on the tensor cores, in logical time
    Clock clock, proxy_clock;     // of the issue, for the checks when the operands are read
};

// An operand as lanes (wgmma.h says in which order), with the exponents of its values.
struct WgmmaOperand {
    std::vector<float> values;
    std::vector<int32_t> exponents;
};

struct Warpgroup {
    std::array<Warp*, 4> warps{};
    std::vector<WgmmaItem> items;  // since the launch; done ones are kept cheap
    uint32_t first_open = 0;       // items before it are done in all warps
    uint32_t agent = 0;
    // The operand B of one item, decoded once for the four warps.
    uint32_t decoded_item = kNone;
    WgmmaOperand a, b;
};

struct Cta {
    Cluster* cluster = nullptr;
    Dim3 index;
    uint32_t rank = 0;
    bool started = false;
    bool allows_dependents = false;  // as far as this CTA goes: griddepcontrol.launch_dependents, or its end
    uint32_t warps_alive = 0;
    std::vector<uint8_t> shared;  // from kSharedBase
    std::vector<Warp> warps;
    std::vector<std::unique_ptr<Warpgroup>> warpgroups;
    std::array<NamedBarrier, 16> barriers;
    std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by shared offset
    uint64_t register_pool = 0;                        // all it has: what it was launched with
    uint64_t tensor_cores_busy_until = 0;              // logical time
    SharedShadow shadow;
    std::vector<SharedCounts> shared_counts;  // by instruction; empty as long as there is none
};

// Work of an engine beside the warps: a TMA or bulk copy, a batch of cp.async.
class AsyncItem {
  public:
    virtual ~AsyncItem() = default;
    // One step of it (a store reads shared memory, later writes global); true when all is done.
    virtual bool perform(Cluster& cluster) = 0;
    virtual std::string describe() const = 0;
    Cta* cta = nullptr;
    uint32_t warp_index = 0;
    int line = 0;
    uint64_t issue_time = 0;
    uint64_t due = 0;  // the turn before which it holds back, unless somebody waits for it
};

struct Cluster {
    Launch* launch = nullptr;
    Dim3 index;
    uint64_t ordinal = 0;  // in its chain of launches
    uint64_t number = 0;   // in its launch
    std::vector<std::unique_ptr<Cta>> ctas;
    std::vector<Warp*> warps;  // of all CTAs
    std::vector<std::unique_ptr<AsyncItem>> async;
    uint64_t barrier_generation = 0;
    uint64_t barrier_done_time = 0;
    Order barrier_order, barrier_done;
    const MemoryRange* last_range = nullptr;
    std::array<uint64_t, 16> bytes{};  // by BytePath
    std::map<std::string, uint64_t> wgmma_counts;
    std::vector<TimelineEvent> timeline;
    Warp* running = nullptr;  // for error messages
    uint32_t next_warp = 0;
    uint32_t stall_rounds = 0;
    bool gives_way = false;            // its turn ends here
    std::vector<uint32_t> priorities;  // of the warps, under an adversarial schedule
    uint32_t priority = 0;             // of the cluster among the resident ones
    uint64_t asked_at = 0;             // how often any had got on when it last had a turn
    uint64_t quiet_since = 0;          // and when it could not go on
    uint64_t turn = 0;                 // the number of its present turn, counted over all clusters
    uint64_t progress = 0;
    uint64_t random_state = 1;
    uint64_t executed = 0;
    uint64_t executed_at_progress = 0;
    uint64_t seen_progress = 0;
    std::vector<AgentInfo> agent_infos;   // vector clocks have a place for each
    std::vector<uint32_t> global_agents;  // their numbers among those of the launch, 0 where none is needed
    SyncTable sync;                       // of addresses in shared memory

    uint64_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return random_state;
    }
};

template <class T>
T* destination(Warp& warp, Ref ref) {
    return reinterpret_cast<T*>(warp.base[0] + ref);
}

template <class T>
const T* source(const Warp& warp, Ref ref) {
    return reinterpret_cast<const T*>(warp.base[ref >> 31] + (ref & ~kConstantBit));
}

inline uint32_t predicate(const Warp& warp, PredRef ref) {
    const uint32_t value = warp.preds[ref & ~kNegateBit];
    return (ref & kNegateBit) != 0 ? ~value : value;
}

inline void set_predicate(Warp& warp, PredRef ref, uint32_t value, uint32_t mask) {
    uint32_t& slot = warp.preds[ref];
    slot = (slot & ~mask) | (value & mask);
}

}  // namespace sim
