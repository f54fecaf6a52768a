"""Builds the driver that does nothing, and controls it from a test."""

import ctypes
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]


def build(folder: Path) -> Path:
    """The shared library of the fake driver, built into `folder`."""
    library = folder / "libcuda_fake.so"
    folders = ("hopper", "python/native", "tests/simulator/src")
    includes = [f"-I{REPOSITORY / name}" for name in folders]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-pthread"]
    options += os.environ.get("FLASH8_TEST_CXXFLAGS", "").split()  # of `make sanitize`
    source = HERE / "fake_driver.cpp"
    subprocess.run(["g++", *options, *includes, str(source), "-o", str(library)], check=True)
    return library


class FakeDriver:
    """The control side of a loaded fake driver: counts, launches, planted failures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.fake_launch.restype = ctypes.c_char_p
        self._alive_before = 0

    def reset(self, devices: int = 1) -> None:
        self._library.fake_reset(devices)
        self._alive_before = self._library.fake_alive()

    def record(self, on: bool) -> None:
        """Off: calls are neither counted nor checked, for benchmarks of what calls the driver."""
        self._library.fake_record(int(on))

    def capture(self, on: bool) -> None:
        """Every stream captures: entries that are illegal then fail, until the next reset."""
        self._library.fake_capture(int(on))

    def fail(self, entry: str, code: int) -> None:
        self._library.fake_fail(entry.encode(), code)

    def delay(self, entry: str, milliseconds: int) -> None:
        """What the entry takes from now on, before it does anything."""
        self._library.fake_delay(entry.encode(), milliseconds)

    def linger(self, milliseconds: int) -> None:
        """How long threads may go on after the interpreter's end, before the process ends."""
        self._library.fake_linger(milliseconds)

    def count(self, entry: str) -> int:
        return self._library.fake_count(entry.encode())

    @property
    def alive(self) -> int:
        """Libraries and allocations that came since the reset and are still there."""
        return self._library.fake_alive() - self._alive_before

    @property
    def context_depth(self) -> int:
        return self._library.fake_context_depth()

    @property
    def capture_mode(self) -> int:
        """Of this thread: 0 unless somebody has left it relaxed."""
        return self._library.fake_capture_mode()

    def parameter(self, launch: int) -> bytes:
        """The first parameter of a launch, for a kernel that has a kernel_info."""
        buffer = ctypes.create_string_buffer(4096)
        size = self._library.fake_parameter(launch, buffer)
        return buffer.raw[:size]

    @property
    def launches(self) -> list[str]:
        library = self._library
        return [library.fake_launch(i).decode() for i in range(library.fake_launches())]
