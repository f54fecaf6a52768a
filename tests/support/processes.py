"""Whether a process that a test has started, or one of its children, still runs."""

from pathlib import Path


def is_alive(pid: int) -> bool:
    """Not a dead one that its parent has not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
