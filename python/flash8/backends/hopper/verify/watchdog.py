"""A kernel that never ends must not hang the process that checks it."""

import time

import torch

#: How long a check's launch may take; a sound one takes milliseconds.
SECONDS = 60.0
_PAUSE = 0.0002
#: Devices on which a launch did not end, and what was said of it. Nothing that is enqueued there
#: ends any more.
hung: dict[torch.device, str] = {}


class KernelHangsError(RuntimeError):
    """A launch did not end. The device goes on with it: the process has to be started anew."""


class Watchdog:
    """Made before a launch on the current stream of `device`; `wait` returns when it has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._mark()

    def wait(self) -> None:
        """Raises KernelHangsError after `SECONDS`, not counting what was enqueued earlier."""
        behind = self._mark()
        if self._before is None or behind is None:
            return
        while not self._before.query():
            if self._device in hung:  # what another thread has enqueued earlier
                raise KernelHangsError(hung[self._device])
            time.sleep(_PAUSE)
        deadline = time.monotonic() + SECONDS
        while not behind.query():
            if time.monotonic() > deadline:
                raise KernelHangsError(
                    f"a kernel of flash8 did not end within {SECONDS:g} s on {self._device}, and "
                    "still runs there: start the process anew with FLASH8_KERNELS=off"
                )
            time.sleep(_PAUSE)

    def _mark(self) -> torch.cuda.Event | None:
        """What the stream has come to when everything enqueued until now has ended."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
