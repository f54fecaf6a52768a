"""Reads the compiler's log and its PTX: what a kernel costs, and what it must not contain."""

import math
import re
from dataclasses import dataclass, replace

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers(?:, used (?P<barriers>\d+) barriers)?")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")

# In PTX: a kernel, the threads of a CTA, and the registers that its warpgroups ask for.
_KERNEL = re.compile(r"\.entry\s+([\w$]+)")
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_REALLOCATION = re.compile(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)")
_WARPGROUP = 128  # threads
_KINDS = ("inc", "dec")

# ptxas serialises wgmma with no more than an information line; no -Werror catches it.
_SERIALIZED = re.compile(r"\(C75\d\d\)|are serialized due to")


@dataclass(frozen=True)
class KernelCost:
    """What ptxas says of one kernel; bytes are per thread, static_shared per CTA."""

    name: str
    registers: int = 0
    barriers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0
    hang: str = ""  # why setmaxnreg would wait for ever, or nothing


@dataclass(frozen=True)
class CompileReport:
    """The kernels of a compilation, and the lines that tell of serialised wgmma."""

    kernels: tuple[KernelCost, ...]
    serialized: tuple[str, ...]

    def problems(self) -> list[str]:
        """What a kernel that ships must not have, one line each; empty when all is well."""
        found = []
        for kernel in self.kernels:
            if kernel.spill_stores or kernel.spill_loads:
                found.append(
                    f"{kernel.name} spills: {kernel.spill_stores} bytes stored, "
                    f"{kernel.spill_loads} bytes loaded"
                )
            elif kernel.stack:
                found.append(f"{kernel.name} has a stack frame of {kernel.stack} bytes")
        found += self.hangs()
        found += [f"wgmma is serialised: {line}" for line in self.serialized]
        if not self.kernels:
            found.append("the log names no kernel")
        return found

    def hangs(self) -> list[str]:
        """Kernels that would never end on a GPU, one line each."""
        return [f"{kernel.name} {kernel.hang}" for kernel in self.kernels if kernel.hang]


def parse_log(log: str, ptx: str = "") -> CompileReport:
    """The report of what `nvcc` and `ptxas -v` wrote, and of the PTX between them."""
    kernels = []
    sections = _ENTRY.split(log)
    parts = _KERNEL.split(ptx)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        kernel = _parse_kernel(name, text)
        kernels.append(replace(kernel, hang=_hang(bodies.get(name, ""), kernel.registers)))
    serialized = tuple(line.strip() for line in log.splitlines() if _SERIALIZED.search(line))
    return CompileReport(tuple(kernels), serialized)


def _parse_kernel(name: str, text: str) -> KernelCost:
    stack = _STACK.search(text)
    registers = _REGISTERS.search(text)
    shared = _SHARED.search(text)
    return KernelCost(
        name=name,
        registers=int(registers["registers"]) if registers else 0,
        barriers=int(registers["barriers"] or 0) if registers else 0,
        stack=int(stack["stack"]) if stack else 0,
        spill_stores=int(stack["stores"]) if stack else 0,
        spill_loads=int(stack["loads"]) if stack else 0,
        static_shared=int(shared["bytes"]) if shared else 0,
    )


def _hang(ptx: str, registers: int) -> str:
    """Whether one warpgroup that releases and the others that acquire ask for more than there is.

    What the kernel was launched with is all there is: `registers` for every thread. Kernels with
    more than these two roles are not judged.
    """
    found = _THREADS.search(ptx)
    asked = {kind: {int(n) for k, n in _REALLOCATION.findall(ptx) if k == kind} for kind in _KINDS}
    if found is None or not registers or any(len(numbers) != 1 for numbers in asked.values()):
        return ""
    warpgroups = math.prod(int(n) for n in found.groups() if n) // _WARPGROUP
    (released,), (acquired,) = asked["dec"], asked["inc"]
    wanted, there = released + (warpgroups - 1) * acquired, warpgroups * registers
    if wanted <= there:
        return ""
    return (
        f"would wait for ever: setmaxnreg asks for {released} + {warpgroups - 1} x {acquired} = "
        f"{wanted} registers of {warpgroups} x {registers} = {there} at launch"
    )
