"""No compiler, and nobody else who compiles, can hold a process up for ever."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

import light_process
from flash8.compiler import (
    CompileError,
    CompilerNotFoundError,
    find_toolchain,
    toolchain,
)
from processes import is_alive

pytest_plugins = ["compiler_fixtures"]

SOON = 8.0  # seconds; what hangs here would take 30 or more


def expect_death(pid: int) -> None:
    end = time.monotonic() + SOON
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.02)


@pytest.fixture
def soon():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON


# ---- compilers that hang ----


def test_nvcc_and_its_children_are_killed_in_time(workshop, monkeypatch, soon):
    child = workshop.folder / "child"
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "40")
    monkeypatch.setenv("FAKE_NVCC_CHILD", str(child))
    monkeypatch.setenv("FLASH8_COMPILE_TIMEOUT", "0.7")
    with pytest.raises(
        CompileError, match=r"kernel\.cu: nvcc did not end within 0\.7 seconds \(FLASH8_COMPILE_T"
    ):
        workshop.compile()
    expect_death(int(child.read_text()))
    assert list((workshop.cache / "tmp").iterdir()) == list(workshop.temporary.iterdir()) == []


def test_a_child_that_outlives_nvcc_is_not_waited_for(workshop, monkeypatch, soon):
    """It has inherited nvcc's output."""
    child = workshop.folder / "child"
    nvcc = workshop.folder / "nvcc"
    text = nvcc.read_text()
    nvcc.write_text(text.replace("exec", f'sleep 30 & echo $! > "{child}"\nexec', 1))
    try:
        assert workshop.compile().cubin.is_file()
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_ptxas_is_killed_in_time(workshop, monkeypatch, soon):
    monkeypatch.setenv("FAKE_PTXAS_SLEEP", "40")
    monkeypatch.setenv("FLASH8_COMPILE_TIMEOUT", "0.7")
    with pytest.raises(CompileError, match="ptxas did not end within"):
        workshop.compile()


def test_a_compiler_that_does_not_say_its_version_is_none(workshop, monkeypatch, soon):
    monkeypatch.setattr(toolchain, "_VERSION_LIMIT", 0.5)
    monkeypatch.setenv("FAKE_NVCC_VERSION_SLEEP", "40")
    with pytest.raises(CompilerNotFoundError, match=r"--version failed: nvcc did not end within"):
        find_toolchain()


@pytest.mark.parametrize("text", ["", "not a program"])
def test_a_compiler_that_is_no_program_is_none(workshop, monkeypatch, text):
    nvcc = workshop.folder / "nvcc"
    nvcc.write_bytes(b"\x7fELF" + text.encode())
    with pytest.raises(CompilerNotFoundError, match="--version failed"):
        find_toolchain()


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from flash8.compiler import Unit, compile_unit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def interrupt():
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    compile_unit(Unit(Path(sys.argv[1])))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_leaves_no_compiler_behind(workshop, monkeypatch, soon):
    child = workshop.folder / "child"
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "40")
    monkeypatch.setenv("FAKE_NVCC_CHILD", str(child))
    command = light_process.command(INTERRUPTED, str(workshop.source), str(child))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "interrupted\n"
    expect_death(int(child.read_text()))


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "soon"])
def test_a_limit_that_is_none_is_refused(workshop, monkeypatch, limit):
    monkeypatch.setenv("FLASH8_COMPILE_TIMEOUT", limit)
    with pytest.raises(ValueError, match=rf"FLASH8_COMPILE_TIMEOUT is '{limit}'; it is a number"):
        workshop.compile()


# ---- NVRTC ----

FAKE_NVRTC = """
import os, time
class nvrtcResult:
    NVRTC_SUCCESS = "ok"
def nvrtcCreateProgram(source, name, count, texts, names):
    return "ok", [source, name]
def nvrtcCompileProgram(program, count, options):
    time.sleep(float(os.environ.get("FAKE_NVRTC_SLEEP", "0")))
    program.append(options)
    return ("refused",) if b"REFUSE" in program[0] else ("ok",)
def nvrtcGetProgramLogSize(program):
    return "ok", 8
def nvrtcGetProgramLog(program, log):
    return ("ok",)
def nvrtcGetPTXSize(program):
    return "ok", 0
def nvrtcGetPTX(program, ptx):
    open("seen", "w").write(repr(program))
    return ("ok",)
"""


def forget_cuda():
    for name in [name for name in sys.modules if name == "cuda" or name.startswith("cuda.")]:
        del sys.modules[name]


@pytest.fixture
def fake_nvrtc(workshop, monkeypatch):
    package = workshop.folder / "site" / "cuda" / "bindings"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    text = FAKE_NVRTC.replace('return "ok", 0', 'return "ok", len(program[0])')
    # bytes cannot be filled in place by Python code: the PTX is what the size reserves, blanks.
    (package / "nvrtc.py").write_text(text)
    monkeypatch.syspath_prepend(str(workshop.folder / "site"))
    forget_cuda()
    monkeypatch.setattr(toolchain, "has_host_compiler", lambda: False)
    yield workshop
    forget_cuda()


def test_nvrtc_runs_in_a_process(fake_nvrtc):
    assert toolchain.has_nvrtc()
    compiled = fake_nvrtc.compile()
    assert find_toolchain().nvrtc
    assert compiled.ptx.stat().st_size == fake_nvrtc.source.stat().st_size
    assert fake_nvrtc.compilations == 0
    fake_nvrtc.source.write_text("REFUSE\n")
    with pytest.raises(CompileError, match=r"NVRTC refused kernel\.cu"):
        fake_nvrtc.compile()


def test_nvrtc_is_killed_in_time(fake_nvrtc, monkeypatch, soon):
    monkeypatch.setenv("FAKE_NVRTC_SLEEP", "40")
    monkeypatch.setenv("FLASH8_COMPILE_TIMEOUT", "1")
    with pytest.raises(CompileError, match="did not end within 1 seconds"):
        fake_nvrtc.compile()


# ---- others who compile ----

HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from flash8.compiler import Unit, compile_unit
start = subprocess.Popen.__init__
def forking(*args, **options):
    # the child has the open file of the lock that is held, and lives on
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        time.sleep(40)
        os._exit(0)
    Path(sys.argv[2]).write_text(str(child))
    subprocess.Popen.__init__ = start
    start(*args, **options)
if sys.argv[3] == "second":
    compile_unit(Unit(Path(sys.argv[1]), (("FIRST", "1"),)))  # asks for the version, too
subprocess.Popen.__init__ = forking
print(compile_unit(Unit(Path(sys.argv[1]))).cubin)
"""


def test_a_forked_child_does_not_keep_the_lock(workshop, soon):
    child = workshop.folder / "child"
    command = light_process.command(HOLDER, str(workshop.source), str(child), "second")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.endswith("kernel.cubin\n")
    try:
        for path in (workshop.cache / "index").iterdir():
            path.unlink()
        assert is_alive(int(child.read_text()))
        assert workshop.compile().cubin.is_file()
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


LOCKED = """
import fcntl, sys, time
files = [open(path) for path in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(40)
"""


def test_a_holder_that_hangs_is_not_waited_for_long(workshop, monkeypatch, soon):
    workshop.compile()
    locks = [str(path) for path in (workshop.cache / "locks").iterdir()]
    workshop.header.write_text("// another tile\n")
    monkeypatch.setenv("FLASH8_COMPILE_TIMEOUT", "1")
    holder = subprocess.Popen(
        [sys.executable, "-IS", "-c", LOCKED, *locks], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        assert "another tile" in workshop.compile().ptx.read_text()
    finally:
        holder.kill()
        holder.communicate()


def test_who_waits_sees_that_it_is_done(workshop, monkeypatch, soon):
    """The holder has published what is waited for, and keeps the lock."""
    workshop.compile()
    locks = [str(path) for path in (workshop.cache / "locks").iterdir()]
    hidden = workshop.folder / "hidden"
    (workshop.cache / "index").rename(hidden)
    holder = subprocess.Popen(
        [sys.executable, "-IS", "-c", LOCKED + "\n", *locks], stdout=subprocess.PIPE, text=True
    )
    back = subprocess.Popen(
        ["sh", "-c", 'sleep 0.5; mv "$1" "$2"', "mv", hidden, workshop.cache / "index"]
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        assert workshop.compile().seconds == 0
    finally:
        holder.kill()
        holder.communicate()
        back.wait()
    assert workshop.compilations == 1


def test_the_lock_is_the_units_own(workshop, monkeypatch, soon):
    workshop.compile()
    locks = [str(path) for path in (workshop.cache / "locks").iterdir()]
    with open(locks[0]) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        workshop.compile(OTHER="1")
