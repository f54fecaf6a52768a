"""Where compiled kernels are kept, and where they are made."""

import atexit
import contextlib
import os
import pwd
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flash8.compiler.files import open_root

#: Files of a killed process are removed after a day.
OLD = 86400.0
_BUILDS = "flash8-build-"
#: nvcc hands names to a shell and to gcc's make rules; these characters mean nothing to them.
_PLAIN = re.compile(r"[A-Za-z0-9_./+@-]+")


def cache_root() -> Path:
    """FLASH8_CACHE, or flash8/ in the user's cache folder, or `private_root` without a home."""
    named = os.environ.get("FLASH8_CACHE")
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # a relative one is to be ignored
        return Path(base) / "flash8"
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return private_root()
    return Path(home) / ".cache" / "flash8"


_stand_ins: dict[int, Path] = {}  # by process: what a fork has made belongs to the parent


def private_root() -> Path:
    """A folder of this user's alone among the temporary files, shared by the user's processes.

    Where its name is taken by another user it is one of this process's own. Raises OSError when
    there is no place for temporary files.
    """
    path = _private_path()
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    if _is_private(path):
        return path
    stand_in = _stand_ins.get(os.getpid())
    if stand_in is None or not stand_in.is_dir():
        stand_in = _stand_ins[os.getpid()] = Path(tempfile.mkdtemp(prefix="flash8-cache-"))
        atexit.register(_remove, stand_in, os.getpid())
    return stand_in


def found_private_root() -> Path | None:
    """What `private_root` has given before, to this process or to another of the user's."""
    with contextlib.suppress(OSError):
        path = _private_path()
        return path if _is_private(path) else _stand_ins.get(os.getpid())
    return None


def _private_path() -> Path:
    return Path(tempfile.gettempdir()) / f"flash8-cache-{os.geteuid()}"


def _is_private(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return True


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


_warned: set[Path] = set()


def warn_once(root: Path, reason: object, instead: Path) -> None:
    """Say of a cache, once in a process, why it is not used."""
    if root in _warned:
        return
    _warned.add(root)
    warnings.warn(
        f"flash8 cannot use its cache {printable(root)} ({printable(reason)}); kernels are kept in "
        f"{printable(instead)} for now. FLASH8_CACHE names another folder",
        RuntimeWarning,
        stacklevel=2,
    )


def is_plain(path: Path) -> bool:
    """Whether compilers take this path as it is."""
    return _PLAIN.fullmatch(str(path)) is not None


@contextmanager
def build_folder(cache: Path) -> Iterator[Path]:
    """A private folder with a plain name, to run compilers in; it is removed afterwards.

    Raises OSError when there is none, and for what goes wrong with it.
    """
    base = next((path for path in _bases(cache) if _is_usable(path)), None)
    if base is None:
        raise OSError(
            "compilers need a folder for temporary files that can be written to and whose path has "
            f"only letters, digits and any of _./+@-; TMPDIR is {os.environ.get('TMPDIR')!r}"
        )
    with contextlib.suppress(OSError), open_root(base) as folder:
        folder.remove_older(OLD, time.time(), _BUILDS)
    path = Path(tempfile.mkdtemp(prefix=_BUILDS, dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _bases(cache: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield Path(tempfile.gettempdir())
    yield from (cache / "tmp", Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


def _is_usable(path: Path) -> bool:
    # Compilers see the path without links: that is what getcwd says.
    real = os.path.realpath(path)
    return is_plain(Path(real)) and os.path.isdir(real) and os.access(real, os.W_OK | os.X_OK)


def printable(text: object) -> str:
    """The text of a path or an error for a message: bytes that are no text are escaped."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
