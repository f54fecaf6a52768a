"""Runs the compiler: one source and its defines become PTX, then a cubin, in a folder."""

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flash8.compiler import nvrtc
from flash8.compiler.errors import CompileError
from flash8.compiler.report import parse_log
from flash8.compiler.toolchain import Toolchain, kernel_root

NVCC_FLAGS = (
    "-ptx",
    "-arch=compute_90a",
    "-std=c++17",
    "-O3",
    "--use_fast_math",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
)
PTXAS_FLAGS = ("-arch=sm_90a", "-O3", "-v")

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Unit:
    """One compilation: a .cu file and its -D options, ("kHeadDim", "128") for -DkHeadDim=128."""

    source: Path
    defines: tuple[tuple[str, str], ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        """What progress lines and tables call it."""
        return self.name or " ".join([self.source.name, *self.define_options()])

    def define_options(self) -> list[str]:
        return [f"-D{name}={value}" if value else f"-D{name}" for name, value in self.defines]


@dataclass(frozen=True)
class BuildResult:
    """What a build read and said; the PTX and the cubin are in the folder."""

    headers: tuple[Path, ...]  # every file that was read, the source among them
    log: str


def build(unit: Unit, toolchain: Toolchain, folder: Path, tick: Tick) -> BuildResult:
    """Compile `unit` into folder/kernel.ptx and folder/kernel.cubin.

    `tick` is called every fraction of a second with the seconds since the start. Raises
    CompileError with the compiler's own words, or because the kernel would hang.
    """
    start = time.monotonic()
    ptx, cubin, depfile = (folder / f"kernel.{suffix}" for suffix in ("ptx", "cubin", "d"))
    back: list[str | Path] = [toolchain.ptxas, *PTXAS_FLAGS, ptx, "-o", cubin]
    if toolchain.nvrtc:
        front_end = nvrtc.compile_ptx(unit, toolchain, ptx, tick)
        log = front_end.log + _run(back, unit, start, tick)
        _refuse_hangs(unit, log, ptx)
        return BuildResult(front_end.headers, log)
    includes = [f"-I{path}" for path in (kernel_root(), *toolchain.include_dirs)]
    front: list[str | Path] = [toolchain.nvcc, *NVCC_FLAGS, *unit.define_options(), *includes]
    front += ["-MD", "-MF", depfile, "-o", ptx, unit.source]
    log = "".join(_run(command, unit, start, tick) for command in (front, back))
    _refuse_hangs(unit, log, ptx)
    headers = _parse_depfile(depfile.read_text())
    depfile.unlink()
    return BuildResult(headers, log)


def _run(command: Sequence[str | Path], unit: Unit, start: float, tick: Tick) -> str:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while True:
            try:
                said, _ = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                tick(time.monotonic() - start)
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        raise CompileError(_failure(command, unit, process.returncode, said), said)
    return said


def _refuse_hangs(unit: Unit, log: str, ptx: Path) -> None:
    """No cubin is made of a kernel that would never end."""
    hangs = parse_log(log, ptx.read_text()).hangs()
    if hangs:
        raise CompileError("\n".join([f"{unit.label} is refused", *hangs]), log)


def _failure(command: Sequence[str | Path], unit: Unit, status: int, said: str) -> str:
    tool = Path(command[0]).name
    lines = said.strip().splitlines()
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)] or lines[-5:]
    return "\n".join([f"{tool} refused {unit.label} (exit status {status})", *errors[:10]])


def _parse_depfile(text: str) -> tuple[Path, ...]:
    """The prerequisites of a make rule; spaces in names are escaped with a backslash."""
    prerequisites = text.partition(": ")[2].replace("\\\n", " ")
    names = re.findall(r"(?:\\.|[^\s\\])+", prerequisites)
    return tuple(sorted({Path(re.sub(r"\\(.)", r"\1", name)).resolve() for name in names}))
