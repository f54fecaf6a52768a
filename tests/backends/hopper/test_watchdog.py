"""A kernel that never ends is told from one that waits for its turn; events are stand-ins."""

import pytest
import torch

from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust, watchdog
from flash8.backends.hopper.verify.watchdog import KernelHangsError, Watchdog

CUDA = torch.device("cuda", 0)


@pytest.fixture
def events(monkeypatch):
    """Answers of the events in the order of their making: how often each says "not yet"."""
    waits = []

    class Event:
        def record(self, stream):
            assert stream == "stream"
            self.left = waits.pop(0)

        def query(self):
            self.left -= 1
            return self.left < 0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    return waits


def test_a_launch_that_ends(events):
    events += [3, 5]
    Watchdog(CUDA).wait()


def test_a_launch_that_never_ends(events, monkeypatch):
    monkeypatch.setattr(watchdog, "SECONDS", 0.01)
    events += [0, 10**9]
    with pytest.raises(KernelHangsError, match=r"did not end within 0.01 s.*FLASH8_KERNELS=off"):
        Watchdog(CUDA).wait()


def test_what_was_enqueued_before_does_not_count(events, monkeypatch):
    monkeypatch.setattr(watchdog, "SECONDS", 0.0)
    events += [50, 0]  # 50 pauses are longer than no time at all
    Watchdog(CUDA).wait()


def test_what_was_enqueued_before_may_be_what_hangs(events, monkeypatch):
    monkeypatch.setattr(watchdog, "hung", {CUDA: "did not end"})
    events += [10**9, 10**9]
    with pytest.raises(KernelHangsError, match="did not end"):
        Watchdog(CUDA).wait()


def test_nothing_is_waited_for_without_a_gpu():
    Watchdog(torch.device("cpu")).wait()


def test_it_is_no_finding_but_an_error(monkeypatch):
    """Portable code on the same stream would wait for ever."""

    def hang(*_):
        raise KernelHangsError("hangs")

    monkeypatch.setattr("flash8.backends.hopper.verify.forward.find_fault", hang)
    with pytest.raises(KernelHangsError):
        trust.find_fault(ForwardVariant("bf16", 64, 64), torch.device("cpu"))
