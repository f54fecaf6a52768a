"""Runs the compiler: one source and its defines become PTX, then a cubin, in a folder."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flash8.compiler import nvrtc
from flash8.compiler.errors import CompileError
from flash8.compiler.places import is_plain
from flash8.compiler.process import Tick, TimeLimitError, run
from flash8.compiler.report import parse_log
from flash8.compiler.toolchain import Toolchain, kernel_root
from flash8.compiler.unit import BuildResult, Unit

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


def build(unit: Unit, toolchain: Toolchain, folder: Path, tick: Tick, limit: float) -> BuildResult:
    """Compile `unit` into folder/kernel.ptx and folder/kernel.cubin.

    `folder` has a plain name (`places.build_folder`). `tick` is called every fraction of a second
    with the seconds since the start; no tool gets more than `limit` seconds. Raises CompileError
    with the compiler's own words, or because the kernel would hang.
    """
    runner = _Runner(unit, folder, tick, limit)
    if toolchain.nvrtc:
        command, text, headers = nvrtc.front_end(unit, toolchain)
        log = runner.run(command, "NVRTC", text)
    else:
        log = runner.run(_nvcc(unit, toolchain, folder))
        headers = parse_depfile((folder / "kernel.d").read_bytes(), folder)
    back: list[str | Path] = [toolchain.ptxas, *PTXAS_FLAGS, "kernel.ptx", "-o", "kernel.cubin"]
    log += runner.run(back)
    _refuse_hangs(unit, log, folder / "kernel.ptx")
    return BuildResult(headers, log)


def _refuse_hangs(unit: Unit, log: str, ptx: Path) -> None:
    """No cubin is made of a kernel that would never end."""
    if not ptx.is_file():
        return  # which the caller says: a compiler that succeeded and wrote nothing
    hangs = parse_log(log, ptx.read_text()).hangs()
    if hangs:
        raise CompileError("\n".join([f"{unit.label} is refused", *hangs]), log)


def _nvcc(unit: Unit, toolchain: Toolchain, folder: Path) -> list[str | Path]:
    source = unit.source.absolute()
    roots = [kernel_root(), *toolchain.include_dirs]
    sources = _plain(source.parent, folder, "source")
    includes = [_plain(root, folder, f"include{i}") for i, root in enumerate(roots)]
    if is_plain(Path(source.name)):
        named = f"{sources}/{source.name}"
    else:
        named = _plain(source, folder, "source.cu")
        includes.insert(0, sources)
    compiler = _plain(toolchain.nvcc.parent, folder, "compiler")
    return [
        f"{compiler}/{toolchain.nvcc.name}",
        *NVCC_FLAGS,
        *unit.define_options(),
        *(f"-I{path}" for path in includes),
        *("-MD", "-MF", "kernel.d", "-o", "kernel.ptx"),
        named,
    ]


def _plain(path: Path, folder: Path, name: str) -> str:
    """`path`, or a link to it where nvcc would take it for something else: it hands its arguments
    to a shell, and has no names with spaces or quotes in the make rules that it writes."""
    if is_plain(path):
        return str(path)
    (folder / name).symlink_to(path)
    return name


@dataclass
class _Runner:
    """Runs the tools of one build in its folder."""

    unit: Unit
    folder: Path
    tick: Tick
    limit: float

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    def run(self, command: Sequence[str | Path], tool: str = "", text: bytes = b"") -> str:
        tool = tool or Path(command[0]).name
        try:
            status, said = run(
                command,
                limit=self.limit,
                folder=self.folder,
                tick=self.tick,
                started=self._started,
                text=text,
            )
        except TimeLimitError as error:
            raise CompileError(f"{self.unit.label}: {error}", "") from error
        if status != 0:
            raise CompileError(_failure(tool, self.unit, status, said), said)
        return said


def _failure(tool: str, unit: Unit, status: int, said: str) -> str:
    lines = said.strip().splitlines()
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)] or lines[-5:]
    return "\n".join([f"{tool} refused {unit.label} (exit status {status})", *errors[:10]])


def parse_depfile(text: bytes, folder: Path) -> tuple[Path, ...]:
    """The prerequisites of a make rule, as absolute paths; relative ones are in `folder`.

    A backslash escapes a blank or "#" and is itself where anything else follows; "$$" is "$".
    """
    prerequisites = os.fsdecode(text).partition(": ")[2].replace("\\\n", " ")
    names = re.findall(r"(?:\\[\s#]|\S)+", prerequisites)
    plain = (re.sub(r"\\([\s#])", r"\1", name).replace("$$", "$") for name in names)
    return tuple(sorted({(folder / name).resolve() for name in plain}))
