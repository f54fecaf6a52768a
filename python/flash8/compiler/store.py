"""The disk cache of compiled kernels: content-addressed, safe between threads and processes."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FILES = ("kernel.cubin", "kernel.ptx", "compile.log")


def cache_root() -> Path:
    """FLASH8_CACHE, or flash8/ in the user's cache folder."""
    named = os.environ.get("FLASH8_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flash8"


def digest(*parts: str | bytes) -> str:
    """A digest of the parts in their order, each with its length."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


class Store:
    """Entries live in objects/<key>/, published whole by one rename and never changed after.

    A request (source, defines, flags, compiler) does not tell which headers will be read, so
    index/<request>.json remembers the ones that were; the key is the digest of the request and of
    all their contents, as they are now.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, request: str) -> Path | None:
        """The folder of the entry that is valid for the headers as they are now, or None."""
        try:
            headers = json.loads((self.root / "index" / f"{request}.json").read_text())
            entry = self.root / "objects" / self.key(request, [Path(name) for name in headers])
        except (OSError, ValueError):
            return None
        return entry if self._is_whole(entry) else None

    def key(self, request: str, headers: Sequence[Path]) -> str:
        """The digest of a request and of the contents of every file that it reads."""
        parts: list[str | bytes] = [request]
        for path in headers:
            parts += [str(path), path.read_bytes()]
        return digest(*parts)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the cache's file system, removed afterwards unless it was published."""
        parent = self.root / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self, request: str) -> Iterator[None]:
        """Held by one thread of one process at a time; a process that dies lets go of it."""
        parent = self.root / "locks"
        parent.mkdir(parents=True, exist_ok=True)
        with open(parent / request, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def publish(self, request: str, headers: Sequence[Path], folder: Path) -> Path:
        """Move a finished folder into the cache and return the entry's folder."""
        sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
        (folder / "sums.json").write_text(json.dumps(sums))
        for path in folder.iterdir():
            _sync(path)
        entry = self.root / "objects" / self.key(request, headers)
        entry.parent.mkdir(parents=True, exist_ok=True)
        if entry.exists():  # a broken one, or find() would have given it
            shutil.rmtree(entry)
        os.rename(folder, entry)
        _sync(entry.parent)
        self._write_index(request, headers)
        return entry

    def _write_index(self, request: str, headers: Sequence[Path]) -> None:
        parent = self.root / "index"
        parent.mkdir(parents=True, exist_ok=True)
        with self.scratch() as folder:
            temporary = folder / "index.json"
            temporary.write_text(json.dumps([str(path) for path in headers]))
            _sync(temporary)
            os.rename(temporary, parent / f"{request}.json")

    def _is_whole(self, entry: Path) -> bool:
        """A file that a full disk or a hand has damaged makes the entry count as absent."""
        try:
            sums = json.loads((entry / "sums.json").read_text())
            return set(sums) == set(FILES) and all(
                hashlib.sha256((entry / name).read_bytes()).hexdigest() == expected
                for name, expected in sums.items()
            )
        except (OSError, ValueError):
            return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
