"""The files that a compilation reads: their names in the cache, and what they contained."""

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flash8.compiler.toolchain import Toolchain, cutlass_root, kernel_root

_LARGEST = 64 << 20  # bytes; no source is a hundredth of that
_SUFFIXES = (".h", ".hpp", ".cuh", ".cu", ".inl")
_COMPILERS = "compiler-"  # and a number: a folder of the compiler


@dataclass(frozen=True)
class Seen:
    """A file at one moment. `stamp` tells of a change even where the text is the same again."""

    digest: str
    stamp: tuple[int, int, int]  # inode, modification and change time in ns

    def is_since(self, time_ns: int) -> bool:
        return max(self.stamp[1:]) >= time_ns


def look(path: Path) -> Seen:
    """What a file contains now. Raises OSError for what is no file, ValueError for no path."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise OSError(f"{path} is no source file")
        digest = hashlib.sha256(file.read()).hexdigest()
    return Seen(digest, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns))


def look_at(paths: Iterable[Path]) -> dict[Path, Seen]:
    """What can be read of these files."""
    seen = {}
    for path in paths:
        try:
            seen[path] = look(path)
        except (OSError, ValueError):
            continue
    return seen


def device_code() -> list[Path]:
    """Every file of hopper/ and cutlass_kernels/."""
    roots = (kernel_root(), cutlass_root())
    return sorted({path.resolve() for root in roots for path in root.rglob("*") if path.is_file()})


def neighbours(source: Path) -> list[Path]:
    """The source and the headers beside it."""
    try:
        beside = [path.resolve() for path in source.parent.iterdir() if path.suffix in _SUFFIXES]
    except OSError:  # it may be closed to be listed
        beside = []
    return [source, *beside[:1000]]


class Names:
    """Names of the files that a source may read.

    What lies in the device code, or in a folder of the compiler's headers, is named from there, so
    that a cache serves another installation of the same code; everything else has its whole path.
    """

    def __init__(self, source: Path, toolchain: Toolchain | None = None) -> None:
        self.source = source.resolve()
        self._roots = {"hopper": kernel_root(), "cutlass_kernels": cutlass_root().resolve()}
        if toolchain is not None:
            folders = [*toolchain.include_dirs, toolchain.nvcc.parent.parent / "include"]
            self._roots |= {_COMPILERS + str(i): path.resolve() for i, path in enumerate(folders)}

    def name(self, path: Path) -> str:
        for name, root in self._roots.items():
            beside = name.startswith(_COMPILERS) and path.is_relative_to(self.source.parent)
            if path.is_relative_to(root) and not beside:
                return os.path.join(name, path.relative_to(root))
        return str(path)

    def path(self, name: str) -> Path:
        first, _, rest = name.partition("/")
        return self._roots[first] / rest if first in self._roots else Path(name)

    def is_the_compilers(self, name: str) -> bool:
        """Whether the compiler brought this file: it is not of the device code, nor beside the
        source."""
        if name.startswith(_COMPILERS):
            return True
        return os.path.isabs(name) and not Path(name).is_relative_to(self.source.parent)
