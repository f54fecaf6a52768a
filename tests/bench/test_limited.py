"""Commands under a time limit: they end, and all that they have started ends with them."""

import os
import signal
import sys
import time

import pytest

from limited import run_limited
from processes import is_alive


def python(script: str) -> list[str]:
    return [sys.executable, "-S", "-c", script]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('said')", "ok"),
        ("raise SystemExit(3)", "failed: exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed: SIGSEGV"),
    ],
)
def test_how_it_ended(tmp_path, script, words):
    ending = run_limited(python(script), limit=20, log=tmp_path / "log")
    assert ending.describe() == words and not ending.killed
    assert ending.ok == (words == "ok")
    assert (tmp_path / "log").read_text() == ("said\n" if ending.ok else "")


def test_a_command_that_cannot_be_started(tmp_path):
    ending = run_limited(["/no/such/command"], limit=20, log=tmp_path / "log")
    assert ending.describe() == "failed: exit status 127"
    assert "/no/such/command" in (tmp_path / "log").read_text()


def test_a_hung_process_is_killed_with_its_children_and_says_where_it_stood(tmp_path):
    script = (
        "import signal, subprocess, sys, time\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "def waits_for_the_kernel(): time.sleep(60)\n"
        "waits_for_the_kernel()\n"
    )
    start = time.monotonic()
    environ = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    ending = run_limited(python(script), limit=2.0, log=tmp_path / "log", environ=environ)
    assert time.monotonic() - start < 16
    assert ending.killed and ending.gone and not ending.ok
    assert ending.describe().startswith("killed after ")
    assert "waits_for_the_kernel" in (tmp_path / "log").read_text()
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_one_that_shrugs_off_the_first_signal_is_killed_too(tmp_path):
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGABRT, lambda *_: print('heard', flush=True))\n"
        "while True: time.sleep(60)"
    )
    ending = run_limited(python(script), limit=0.5, log=tmp_path / "log")
    assert ending.killed and ending.gone and ending.status == -signal.SIGKILL
    assert (tmp_path / "log").read_text() == "heard\n"


def test_what_it_leaves_behind_ends_with_it(tmp_path):
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    ending = run_limited(python(script), limit=20, log=tmp_path / "log")
    assert ending.ok and ending.gone
    assert not is_alive(int((tmp_path / "pid").read_text()))
