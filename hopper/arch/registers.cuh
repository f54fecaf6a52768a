// How a CTA's registers are shared out between its warpgroups by setmaxnreg.
//
// A warpgroup can acquire only what others of its CTA have released. The pool is the registers that the CTA
// was launched with, not the multiprocessor's 64K. An acquire beyond it waits for ever.

#pragma once

namespace flash8 {

// Registers come in eights per thread.
constexpr int kRegisterStep = 8;
constexpr int kMultiprocessorRegisters = 64 * 1024;

// Registers per thread at launch, as ptxas sets them under __launch_bounds__(threads, 1) with setmaxnreg.
constexpr int registers_at_launch(int threads) {
    int const most = kMultiprocessorRegisters / threads / kRegisterStep * kRegisterStep;
    return most < 255 ? most : 255;
}

// Registers per thread of each role, when the producer warpgroup needs kProducerNeeds. The consumer
// warpgroups share the rest equally, and the producer keeps what does not divide.
template <int kConsumerWarpgroups, int kProducerNeeds>
struct RegisterBudget {
    static constexpr int kThreads = (kConsumerWarpgroups + 1) * 128;
    static constexpr int kTotal = registers_at_launch(kThreads) * (kConsumerWarpgroups + 1);
    static constexpr int kConsumer =
        (kTotal - kProducerNeeds) / kConsumerWarpgroups / kRegisterStep * kRegisterStep;
    static constexpr int kProducer = kTotal - kConsumerWarpgroups * kConsumer;
    static_assert(kProducer + kConsumerWarpgroups * kConsumer <= kTotal,
                  "the consumers would wait for registers that the CTA does not have");
    static_assert(kProducer % kRegisterStep == 0 && kConsumer % kRegisterStep == 0,
                  "setmaxnreg takes eights");
    static_assert(24 <= kProducer && kConsumer <= 256, "setmaxnreg takes 24 to 256");
    static_assert(kProducer <= registers_at_launch(kThreads) && registers_at_launch(kThreads) <= kConsumer,
                  "the producer releases, the consumers acquire");
};

}  // namespace flash8
