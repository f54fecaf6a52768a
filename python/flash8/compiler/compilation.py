"""One unit that no cache has: who compiles it, of what, and where the result is kept."""

import errno
import time
from dataclasses import dataclass
from pathlib import Path

from flash8.compiler import nvrtc
from flash8.compiler.build import NVCC_FLAGS, PTXAS_FLAGS, build
from flash8.compiler.errors import CompileError
from flash8.compiler.places import build_folder, found_private_root, private_root, warn_once
from flash8.compiler.process import Tick
from flash8.compiler.reads import Names, Seen, device_code, look_at, neighbours
from flash8.compiler.store import FILES, CacheUnusableError, Entry, Request, Store, digest
from flash8.compiler.toolchain import Toolchain
from flash8.compiler.unit import BuildResult, Unit

_ATTEMPTS = 3
#: By how much the times of files may be behind the clock, in ns.
_CLOCK_STEP = 10_000_000
_DISK_IS_FULL = ("No space left on device", "Disk quota exceeded")


def make_request(unit: Unit, toolchain: Toolchain | None = None) -> Request:
    """What is asked of the cache for a unit: from this compiler, or from any."""
    names = Names(unit.source)
    options = [*NVCC_FLAGS, *PTXAS_FLAGS, *unit.define_options()]
    key = digest(names.name(names.source), *options)
    if toolchain is None:
        return Request(key, None, names)
    return Request(key, _toolchain_key(toolchain), Names(unit.source, toolchain))


def find_anywhere(store: Store, request: Request) -> Entry | None:
    """The entry in `store`, or in the private folder that stands in for one."""
    private = found_private_root()
    return store.find(request) or (Store(private).find(request) if private else None)


def _toolchain_key(toolchain: Toolchain) -> str:
    """The digest of all that decides what a compiler makes of a source."""
    return digest(*toolchain.identity(), *(nvrtc.identity() if toolchain.nvrtc else ()))


@dataclass(frozen=True)
class _Built:
    """What a compilation gave, and the names and digests of the files that it was made of."""

    reads: list[tuple[str, str]]
    files: dict[str, bytes]


@dataclass
class Compilation:
    """`request` names the toolchain; no call of a compiler takes more than `limit` seconds."""

    unit: Unit
    toolchain: Toolchain
    request: Request
    tick: Tick
    limit: float

    def into(self, store: Store) -> tuple[Entry, float]:
        """The entry, and the seconds that it took to compile: 0 if another process has done it.

        It goes into `store`, or, where that cannot be written to, into a private folder, with one
        warning.
        """
        start = time.monotonic()
        built: list[
            _Built
        ] = []  # one that could not be kept where it was to be need not be made again
        try:
            return self._into(store, start, built)
        except CacheUnusableError as error:
            private = Store(private_root())
            if private.root == store.root:
                raise
            warn_once(store.root, error, private.root)
            return self._into(private, start, built)

    def _into(self, store: Store, start: float, built: list[_Built]) -> tuple[Entry, float]:
        with store.lock(self.request, self.limit, lambda: self._waits(store, start)):
            if not built:
                entry = find_anywhere(store, self.request)
                if entry is not None:
                    return entry, 0.0
                built.append(self._build(store))
            entry = store.publish(self.request, built[0].reads, built[0].files)
            return entry, time.monotonic() - start

    def _waits(self, store: Store, start: float) -> bool:
        """Tells the user that time passes; whether there is nothing to wait for any more."""
        self.tick(time.monotonic() - start)
        return store.find(self.request) is not None

    def _build(self, store: Store) -> _Built:
        sources = {*neighbours(self.request.names.source), *device_code()}
        sources.update(store.reads(self.request))
        for _ in range(_ATTEMPTS):
            began = time.time_ns() - _CLOCK_STEP
            before = look_at(sources)
            result, files = self._run(store)
            after = look_at(result.headers)
            if all(_is_as_before(path, before, after, began) for path in result.headers):
                name = self.request.names.name
                reads = [(name(path), after[path].digest) for path in result.headers]
                return _Built(reads, files)
            sources.update(result.headers)
        raise CompileError(f"the files that {self.unit.label} reads keep changing", "")

    def _run(self, store: Store) -> tuple[BuildResult, dict[str, bytes]]:
        with build_folder(store.root) as folder:
            try:
                result = build(self.unit, self.toolchain, folder, self.tick, self.limit)
            except CompileError as error:
                if any(words in error.log for words in _DISK_IS_FULL):
                    raise OSError(errno.ENOSPC, f"{error}; TMPDIR names another folder") from error
                raise
            files = {"compile.log": result.log.encode("utf-8", "replace")}
            for name in set(FILES) - files.keys():
                files[name] = _output(folder / name)
            return result, files


def _output(path: Path) -> bytes:
    data = path.read_bytes() if path.is_file() else b""
    if not data:
        raise CompileError(f"the compiler ended well and wrote no {path.name}", "")
    return data


def _is_as_before(
    path: Path, before: dict[Path, Seen], after: dict[Path, Seen], began: int
) -> bool:
    """Whether the compiler read what `after` shows. A file that was not looked at before, since
    nothing told that it would be read, must be older than the compilation."""
    seen = after.get(path)
    if seen is None:
        return False
    return before[path] == seen if path in before else not seen.is_since(began)
