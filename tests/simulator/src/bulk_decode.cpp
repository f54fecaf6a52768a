// Bulk and tensor copies: from the instruction to an Op.
#include "bulk_instruction.h"
#include "decoder.h"

namespace sim {
namespace {

Step nothing(Warp&, const Op&, uint32_t) {
    return Step::kNext;
}

class BulkDecoder {
  public:
    explicit BulkDecoder(Decoder& d) : d_(d), places_(kPlaces, kNone) {}

    void address(const Operand& operand, uint32_t place) {
        bool wide = false;
        places_[place] = d_.address(operand, &wide);
        places_[place + 1] = static_cast<uint32_t>(d_.op.imm);
        places_[place + 2] = wide;
        d_.op.imm = 0;
    }

    void tensor(const Operand& operand, uint32_t dimensions) {
        if (operand.kind != Operand::kAddress || operand.elements.size() != dimensions + 1) {
            d_.fail(format("expected [map, {%u coordinates}]", dimensions));
        }
        Operand base = operand;
        base.elements.resize(1);
        address(base, kMap);
        for (uint32_t i = 0; i < dimensions; ++i) {
            places_[kCoordinates + i] = d_.src(operand.elements[i + 1], Type::kS32);
        }
    }

    void value(const Operand& operand, uint32_t place, Type type) { places_[place] = d_.src(operand, type); }

    void finish() {
        d_.op.list = d_.list(places_);
        d_.op.list_size = kPlaces;
        d_.op.run = issue_bulk;
    }

  private:
    Decoder& d_;
    std::vector<uint32_t> places_;
};

bool take_policy(Decoder& d) {
    return d.take("L2::cache_hint");
}

void take_reduction(Decoder& d, bool with_type) {
    if ((d.op.target & kReduces) == 0) {
        return;
    }
    const ReduceOp operation = take_reduce_op(d);
    d.take("noftz");
    const Type type = with_type ? d.take_type() : Type::kNone;
    d.op.target2 = static_cast<uint32_t>(operation) << 8 | static_cast<uint32_t>(type);
}

uint32_t take_dimensions(Decoder& d) {
    const std::string dimensions = d.take_any({"1d", "2d", "3d", "4d", "5d"});
    d.take("tile");
    if (d.in().has("im2col") || d.in().has("im2col_no_offs")) {
        d.fail("im2col tensor maps are not supported");
    }
    return static_cast<uint32_t>(dimensions[0] - '0');
}

void decode_tensor(Decoder& d) {
    const uint32_t dimensions = take_dimensions(d);
    BulkDecoder b(d);
    d.op.target |= kTiled;
    d.op.code2 = static_cast<uint16_t>(dimensions);
    const Space to = d.take_space();
    const Space from = d.take_space();
    if (to == Space::kSharedCluster || (to == Space::kSharedCta && from == Space::kGlobal)) {
        d.op.code = kLoad;
        d.take_any({"mbarrier::complete_tx::bytes"});
        const bool multicast = d.take("multicast::cluster");
        const bool policy = take_policy(d);
        d.need_operands(3u + multicast + policy, 3u + multicast + policy);
        b.address(d.operand(0), kTo);
        b.tensor(d.operand(1), dimensions);
        b.address(d.operand(2), kBarrier);
        if (multicast) {
            d.op.target |= kMulticast;
            b.value(d.operand(3), kMask, Type::kU16);
        }
    } else if (to == Space::kGlobal && from == Space::kSharedCta) {
        d.op.code = kStore;
        d.op.level = (d.op.target & kReduces) != 0 ? kGpuLevel : kWeak;
        take_reduction(d, false);
        d.take_any({"bulk_group"});
        const bool policy = take_policy(d);
        d.need_operands(2u + policy, 2u + policy);
        b.tensor(d.operand(0), dimensions);
        b.address(d.operand(1), kFrom);
    } else {
        d.fail("unknown pair of state spaces");
    }
    b.finish();
}

void decode_plain(Decoder& d) {
    BulkDecoder b(d);
    const Space to = d.take_space();
    const Space from = d.take_space();
    if (to == Space::kGlobal && from == Space::kSharedCta) {
        d.op.code = kStore;
        d.op.level = (d.op.target & kReduces) != 0 ? kGpuLevel : kWeak;
        d.take_any({"bulk_group"});
        const bool policy = take_policy(d);
        take_reduction(d, true);
        d.need_operands(3u + policy, 3u + policy);
        b.address(d.operand(0), kTo);
        b.address(d.operand(1), kFrom);
        b.value(d.operand(2), kSize, Type::kU32);
        b.finish();
        return;
    }
    const bool shared_source = from == Space::kSharedCta;
    const bool to_shared = to == Space::kSharedCluster || to == Space::kSharedCta;
    if (!to_shared || (!shared_source && from != Space::kGlobal)) {
        d.fail("unknown pair of state spaces");
    }
    d.op.code = shared_source ? kSharedToShared : kLoad;
    d.take_any({"mbarrier::complete_tx::bytes"});
    const bool multicast = d.take("multicast::cluster");
    const bool policy = take_policy(d);
    take_reduction(d, true);
    d.need_operands(4u + multicast + policy, 4u + multicast + policy);
    b.address(d.operand(0), kTo);
    b.address(d.operand(1), kFrom);
    b.value(d.operand(2), kSize, Type::kU32);
    b.address(d.operand(3), kBarrier);
    if (multicast) {
        d.op.target |= kMulticast;
        b.value(d.operand(4), kMask, Type::kU16);
    }
    b.finish();
}

void decode_prefetch(Decoder& d) {
    if (d.take("tensor")) {
        take_dimensions(d);
    }
    d.take_any({"L2"});
    d.take_any({"global"});
    take_policy(d);
    d.op.run = nothing;
}

}  // namespace

void decode_bulk(Decoder& d) {
    d.op.op_class = OpClass::kTma;
    d.op.target = d.op.code2 != 0 ? kReduces : 0;
    if (d.take("commit_group")) {
        d.op.run = commit_bulk;
    } else if (d.take("wait_group")) {
        d.op.code = d.take("read");
        d.need_operands(1, 1);
        d.op.imm = static_cast<int64_t>(d.integer(d.operand(0)));
        d.op.run = wait_bulk;
    } else if (d.take("prefetch")) {
        decode_prefetch(d);
    } else if (d.take("tensor")) {
        decode_tensor(d);
    } else {
        decode_plain(d);
    }
}

}  // namespace sim
