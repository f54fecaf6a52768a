"""Reads the compiler's log: what a kernel costs, and what it must not contain."""

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers(?:, used (?P<barriers>\d+) barriers)?")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")

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
        found += [f"wgmma is serialised: {line}" for line in self.serialized]
        if not self.kernels:
            found.append("the log names no kernel")
        return found


def parse_log(log: str) -> CompileReport:
    """The report of what `nvcc` and `ptxas -v` wrote."""
    kernels = []
    sections = _ENTRY.split(log)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        kernels.append(_parse_kernel(name, text))
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
