// How a CTA's registers are shared out between its warpgroups by setmaxnreg.
//
// What one warpgroup releases another may acquire, and there is nothing else: the pool is what the CTA was
// launched with, not the multiprocessor's 64K. An acquire beyond it waits for ever.

#pragma once

namespace flash8 {

// Registers come in eights per thread.
constexpr int kRegisterStep = 8;
constexpr int kMultiprocessorRegisters = 64 * 1024;

// Of a thread, at launch: what ptxas gives where setmaxnreg is used under __launch_bounds__(threads, 1).
constexpr int registers_at_launch(int threads) {
    int const most = kMultiprocessorRegisters / threads / kRegisterStep * kRegisterStep;
    return most < 255 ? most : 255;
}

// Of a thread of each role, when one producer warpgroup needs kProducerNeeds: the consumer warpgroups share
// what is left equally, and the producer keeps what does not divide.
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
