"""The disk cache of compiled kernels: content-addressed, safe between threads and processes."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash8.compiler.files import Folder, UntrustedError, open_root
from flash8.compiler.places import OLD, printable
from flash8.compiler.reads import Names, look

FILES = ("kernel.cubin", "kernel.ptx", "compile.log")
_SUMS = "sums.json"
_LARGEST = 256 << 20  # bytes of one file
_MOST_RECORDS = 32  # lists of headers that are tried for one request


def digest(*parts: str | bytes) -> str:
    """A digest of the parts in their order, each with its length."""
    state = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part)
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


class CacheUnusableError(OSError):
    """Nothing can be put into a cache; the message says why."""


@dataclass(frozen=True)
class Request:
    """What is asked for, and from which compiler; None is any that the cache knows.

    `key` does not depend on the compiler, so a cache can be asked where there is none.
    """

    key: str
    toolchain: str | None
    names: Names


@dataclass(frozen=True)
class Entry:
    """A folder of the cache, and what its files held when it was found whole."""

    folder: Path
    files: Mapping[str, bytes]


class Store:
    """Entries live in objects/<key>/, published whole by one rename and never changed after.

    A request does not tell which headers will be read, so index/<request>-<compiler>-<list>.json
    remembers the lists of those that were; the key of an entry is the digest of the request, the
    compiler and the contents of all files of a list, as they are now.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    # ---- reading ----

    def find(self, request: Request) -> Entry | None:
        """The entry that is valid for the files as they are now, or None. It writes nothing."""
        try:
            with open_root(self.root) as root:
                for key in self._keys(root, request):
                    entry = self._entry(root, key)
                    if entry is not None:
                        return entry
        except (OSError, ValueError):
            pass
        return None

    def reads(self, request: Request) -> list[Path]:
        """The files of the lists that are remembered for a request."""
        found: dict[str, None] = {}
        try:
            with open_root(self.root) as root:
                for _, reads in self._records(root, request):
                    found.update(dict.fromkeys(name for name, _ in reads))
        except OSError:
            pass
        return [request.names.path(name) for name in found]

    def trouble(self) -> str:
        """Why nothing in the cache is believed, or an empty text."""
        try:
            with open_root(self.root):
                return ""
        except UntrustedError as error:
            return str(error)
        except OSError:
            return ""

    def _records(
        self, root: Folder, request: Request
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """The compiler, and the names and digests of what was read, the latest first."""
        prefix = f"{request.key}-{request.toolchain or ''}"
        with root.folder("index") as index:
            for name in index.newest(prefix)[:_MOST_RECORDS]:
                try:
                    yield _parse_record(index.read(name, _LARGEST))
                except (OSError, ValueError, RecursionError):
                    continue

    def _keys(self, root: Folder, request: Request) -> Iterator[str]:
        seen: dict[str, str] = {}

        def now(name: str, then: str) -> str:
            if request.toolchain is None and request.names.is_the_compilers(name):
                return then  # it may have gone with the compiler, and is no part of the kernel
            if name not in seen:
                seen[name] = look(request.names.path(name)).digest
            return seen[name]

        for toolchain, reads in self._records(root, request):
            try:
                yield entry_key(
                    request.key, toolchain, [(name, now(name, then)) for name, then in reads]
                )
            except (OSError, ValueError):
                continue

    def _entry(self, root: Folder, key: str) -> Entry | None:
        """A file that a full disk or a hand has damaged makes the entry count as absent."""
        try:
            with root.folder("objects") as objects, objects.folder(key) as folder:
                sums = json.loads(folder.read(_SUMS, _LARGEST))
                files = {name: folder.read(name, _LARGEST) for name in FILES}
        except (OSError, ValueError, RecursionError):
            return None
        if sums != _sums(key, files):
            return None
        return Entry(self.root / "objects" / key, files)

    # ---- writing ----

    @contextmanager
    def lock(
        self, request: Request, limit: float, wait: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Held by one thread of one process at a time; a process that dies lets go of it.

        Another process that wants it waits until `wait`, which is asked every second, says that
        there is no need, and at most `limit` seconds. So a process that hangs holds up no other
        for longer, and two that publish the same entry do each other no harm.

        Raises CacheUnusableError when the cache cannot be written to.
        """
        descriptor = self._open_lock(request.key)
        try:
            asked = time.monotonic()
            end = asked + limit
            while not (held := _try_lock(descriptor)) and time.monotonic() < end:
                if time.monotonic() - asked > 1.0:
                    if wait():
                        break
                    asked = time.monotonic()
                time.sleep(0.05)
            try:
                yield
            finally:
                if held:
                    # Not only closed: a child forked meanwhile has the same open file.
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _open_lock(self, key: str) -> int:
        with _reported(), self._writable() as root, root.folder("locks", make=True) as locks:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(key, flags, 0o644, dir_fd=locks.descriptor)
            try:
                if _try_lock(descriptor):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            except OSError:
                os.close(descriptor)
                raise
            return descriptor

    @contextmanager
    def _writable(self) -> Iterator[Folder]:
        """The root, made if it is missing, without what killed processes left in it long ago."""
        os.makedirs(self.root, 0o755, exist_ok=True)
        with open_root(self.root) as root:
            with root.folder("tmp", make=True) as folder:
                folder.remove_older(OLD, time.time())
            yield root

    def publish(
        self, request: Request, reads: Sequence[tuple[str, str]], files: Mapping[str, bytes]
    ) -> Entry:
        """Put what the request's compiler made of files with these names and digests into the
        cache.

        Raises CacheUnusableError when that cannot be done.
        """
        toolchain = request.toolchain or ""
        key = entry_key(request.key, toolchain, reads)
        with _reported(), self._writable() as root, root.folder("tmp") as scratch:
            with scratch.new_folder() as (name, folder):
                for file, data in files.items():
                    folder.write(file, data)
                folder.write(_SUMS, json.dumps(_sums(key, files)).encode())
                folder.sync()
                with root.folder("objects", make=True) as objects:
                    self._put(root, scratch, name, objects, key)
            with scratch.new_folder() as (_, folder):
                record = {"toolchain": toolchain, "reads": [list(read) for read in reads]}
                folder.write("record", json.dumps(record).encode())
                listed = digest(*(name for name, _ in reads))
                with root.folder("index", make=True) as index:
                    _rename(folder, "record", index, f"{request.key}-{toolchain}-{listed}.json")
        return Entry(self.root / "objects" / key, dict(files))

    def _put(self, root: Folder, scratch: Folder, name: str, objects: Folder, key: str) -> None:
        """Move a finished folder to its place. A broken entry there gives way to it; one that
        another process has just published stays."""
        for attempt in range(3):
            try:
                _rename(scratch, name, objects, key)
                return
            except OSError:
                if self._entry(root, key) is not None:
                    return
                if attempt == 2:
                    raise
            aside = f"{name}-{attempt}"
            _rename(objects, key, scratch, aside)
            scratch.remove(aside)


def entry_key(request: str, toolchain: str, reads: Sequence[tuple[str, str]]) -> str:
    """The key of the entry of a request, compiled by `toolchain` from files of these digests."""
    return digest(request, toolchain, *(part for read in reads for part in read))


def _sums(key: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What sums.json says: which entry it is of, and the digests of its files."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {"key": key, "files": digests}


def _parse_record(text: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Raises ValueError for anything but what `publish` writes."""
    record = json.loads(text)
    if not isinstance(record, dict) or not isinstance(record.get("toolchain"), str):
        raise ValueError("no record")
    reads = record.get("reads")
    if not isinstance(reads, list):
        raise ValueError("no record")
    pairs = []
    for read in reads:
        if not (isinstance(read, list) and len(read) == 2):
            raise ValueError("no record")
        if not all(isinstance(text, str) for text in read):
            raise ValueError("no record")
        pairs.append((read[0], read[1]))
    return record["toolchain"], pairs


def _rename(source: Folder, old: str, target: Folder, new: str) -> None:
    os.rename(old, new, src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
    target.sync()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _reported() -> Iterator[None]:
    """Any OSError is one of the cache."""
    try:
        yield
    except CacheUnusableError:
        raise
    except OSError as error:
        raise CacheUnusableError(error.errno, printable(error)) from error
