"""What is read from a compiler's log."""

import pytest

from flash8.compiler import KernelCost, parse_log

# The wording of ptxas 13.0.
LOG = """\
ptxas info    : 0 bytes gmem, 400 bytes cmem[3]
ptxas info    : Compiling entry function 'forward' for 'sm_90a'
ptxas info    : Function properties for forward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 7 barriers, 1024 bytes smem
ptxas info    : Compile time = 1234.5 ms
ptxas info    : Compiling entry function '_Z7combinev' for 'sm_90a'
ptxas info    : Function properties for _Z7combinev
    32 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 32 bytes cumulative stack size
"""
CLEAN = LOG.replace(
    "32 bytes stack frame, 20 bytes spill stores, 24",
    "0 bytes stack frame, 0 bytes spill stores, 0",
)


def test_every_kernel_has_its_costs():
    assert parse_log(LOG).kernels == (
        KernelCost("forward", registers=168, barriers=7, static_shared=1024),
        KernelCost("_Z7combinev", registers=255, stack=32, spill_stores=20, spill_loads=24),
    )


def test_spills_are_a_problem():
    assert parse_log(LOG).problems() == ["_Z7combinev spills: 20 bytes stored, 24 bytes loaded"]


def test_a_stack_frame_without_spills_is_a_problem():
    log = CLEAN.replace("0 bytes stack frame", "16 bytes stack frame", 1)
    assert parse_log(log).problems() == ["forward has a stack frame of 16 bytes"]


def test_a_clean_log_has_no_problem():
    assert parse_log(CLEAN).problems() == []


def test_serialised_wgmma_is_a_problem_in_both_wordings():
    lines = [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources in function 'forward'",
        "ptxas info    : (C7519) something new in function 'forward'",
        "ptxas info    : wgmma.mma_async instructions are serialized due to a reason of its own",
    ]
    report = parse_log(CLEAN + "\n".join(lines))
    assert report.serialized == tuple(lines)
    assert report.problems() == [f"wgmma is serialised: {line}" for line in lines]


def test_a_log_without_a_kernel_is_a_problem():
    assert parse_log("ptxas info    : 0 bytes gmem\n").problems() == ["the log names no kernel"]


def asks(released: int, acquired: int, threads: str = "384, 1, 1", kernel: str = "forward") -> str:
    """PTX of a kernel whose first warpgroup releases registers and whose others acquire some."""
    return f"""
.visible .entry {kernel}(.param .u64 p)
.maxntid {threads}
.minnctapersm 1
{{
setmaxnreg.dec.sync.aligned.u32 {released};
setmaxnreg.inc.sync.aligned.u32 {acquired};
}}
"""


def test_registers_that_a_cta_does_not_have_are_a_hang():
    """168 registers for each of 384 threads: 504 for a thread of every warpgroup."""
    report = parse_log(CLEAN, asks(48, 232))
    assert report.problems() == [
        "forward would wait for ever: setmaxnreg asks for 48 + 2 x 232 = 512 registers of "
        "3 x 168 = 504 at launch"
    ]
    assert report.hangs() == report.problems()


@pytest.mark.parametrize(
    "ptx",
    [
        asks(40, 232),
        asks(56, 224),
        asks(24, 240, threads="128, 3, 1"),
        asks(48, 232, kernel="another"),
        asks(48, 232).replace("}", "setmaxnreg.inc.sync.aligned.u32 160;\n}"),
        "",
    ],
    ids=["40+2x232", "56+2x224", "24+2x240", "of another kernel", "no two roles", "no PTX"],
)
def test_registers_that_a_cta_has_are_no_hang(ptx):
    assert parse_log(CLEAN, ptx).problems() == []
