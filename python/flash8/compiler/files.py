"""Files of a folder that others may write to, too: no link is followed, and owner and mode decide
what is believed."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class UntrustedError(OSError):
    """Another user could have written what is found here."""


class Folder:
    """An open folder. Names are looked up in it, not along a path that could change meanwhile."""

    def __init__(self, descriptor: int, owners: frozenset[int]) -> None:
        self.descriptor = descriptor
        self._owners = owners

    @contextmanager
    def folder(self, name: str, *, make: bool = False) -> Iterator["Folder"]:
        """The folder `name` in this one, made first if `make`.

        Raises OSError when there is none, UntrustedError when it is another user's.
        """
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self.descriptor)
        descriptor = os.open(name, _READ | os.O_DIRECTORY, dir_fd=self.descriptor)
        try:
            _check(os.fstat(descriptor), name, self._owners)
            yield Folder(descriptor, self._owners)
        finally:
            os.close(descriptor)

    def read(self, name: str, most: int) -> bytes:
        """The bytes of the file `name`, which must not be more than `most`.

        Raises OSError for anything but a file that only its owner, this user or root, can write.
        """
        descriptor = os.open(name, _READ, dir_fd=self.descriptor)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                raise UntrustedError(f"{name} is not a file of at most {most} bytes")
            _check(status, name, self._owners)
            if status.st_mode & stat.S_IWOTH:
                raise UntrustedError(f"{name} may be written to by everybody")
            return file.read(most)

    def write(self, name: str, data: bytes) -> None:
        """A new file, readable as the umask says, and on the disk when this returns."""
        descriptor = os.open(name, _WRITE, 0o644, dir_fd=self.descriptor)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)

    @contextmanager
    def new_folder(self) -> Iterator[tuple[str, "Folder"]]:
        """A folder of a new name; whatever has that name afterwards is removed."""
        name = secrets.token_hex(8)
        os.mkdir(name, 0o755, dir_fd=self.descriptor)
        try:
            with self.folder(name) as made:
                yield name, made
        finally:
            self.remove(name)

    def newest(self, prefix: str) -> list[str]:
        """The names in it that start so, the youngest first."""
        ages = {}
        for name in os.listdir(self.descriptor):
            if name.startswith(prefix):
                with contextlib.suppress(OSError):
                    ages[name] = self.status(name).st_mtime_ns
        return sorted(ages, key=lambda name: (-ages[name], name))

    def status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """A file, a link or a whole folder, as far as that can be done."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(self.status(name).st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.descriptor)
            else:
                os.unlink(name, dir_fd=self.descriptor)

    def remove_older(self, seconds: float, now: float, prefix: str = "") -> None:
        """What this user has left there a long time ago."""
        for name in os.listdir(self.descriptor):
            with contextlib.suppress(OSError):
                status = self.status(name)
                old = now - status.st_mtime > seconds
                if name.startswith(prefix) and old and status.st_uid == os.geteuid():
                    self.remove(name)

    def sync(self) -> None:
        os.fsync(self.descriptor)


@contextmanager
def open_root(path: Path) -> Iterator[Folder]:
    """The folder that a user has named. Links lead to it, if they are the user's own or root's.

    What is in it is believed if it belongs to this user, to root, or to whom the folder belongs
    when nobody else can write there.
    """
    mine = frozenset({os.geteuid(), 0})
    if path.is_symlink() and path.lstat().st_uid not in mine:
        raise UntrustedError(f"{path} is a link of user {path.lstat().st_uid}")
    descriptor = os.open(os.path.realpath(path), _READ | os.O_DIRECTORY)
    try:
        status = os.fstat(descriptor)
        _check(status, str(path), mine | {status.st_uid})
        yield Folder(descriptor, mine | {status.st_uid})
    finally:
        os.close(descriptor)


def _check(status: os.stat_result, name: str, owners: frozenset[int]) -> None:
    if status.st_uid not in owners:
        raise UntrustedError(f"{name} belongs to user {status.st_uid}")
    if status.st_uid not in (os.geteuid(), 0) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedError(f"{name} belongs to user {status.st_uid}, and others may write to it")
