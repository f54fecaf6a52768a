# ruff: noqa: E501 - PTX text reads better unbroken
"""Allocations of which a kernel reads bytes that neither the host nor a kernel has written."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import flash8_sim as S
from planted import program

PARAMETERS = ".param .u64 src, .param .u64 dst"
PROLOGUE = ".reg .b32 t, x, y; .reg .b64 g, h; .reg .b16 c; .reg .pred p; mov.u32 t, %tid.x; ld.param.u64 g, [src]; ld.param.u64 h, [dst];\n"
BULK = """
.shared .align 128 .b8 mem[512]; .shared .align 8 .b64 bar; .reg .b32 m, b; mov.u32 m, mem; mov.u32 b, bar; setp.ne.u32 p, t, 0; @p bra $W;
mbarrier.init.shared::cta.b64 [b], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [m], [g], 128, [b]; //tag read
$W: bar.sync 0; { .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [b], 0; @ok bra D; bra L; D: }
"""
REDUCE = """
.shared .align 128 .b8 mem[128]; .reg .b32 m; mov.u32 m, mem; mad.lo.u32 x, t, 4, m; st.shared.u32 [x], t; fence.proxy.async.shared::cta; bar.sync 0;
setp.ne.u32 p, t, 0; @p bra $E;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [g], [m], 128; //tag read
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; $E:
"""
READS = {
    "ld": "mad.wide.u32 g, t, 4, g; ld.global.u32 x, [g]; //tag read",
    "ld.v4": "and.b32 x, t, 7; mad.wide.u32 g, x, 16, g; ld.global.v4.u32 {x, y, x, y}, [g]; //tag read",
    "generic": "mad.wide.u32 g, t, 4, g; ld.u32 x, [g]; //tag read",
    "one lane": "setp.ne.u32 p, t, 9;\n@!p ld.global.u16 c, [g + 36]; //tag read",
    "atom": "atom.global.add.u32 x, [g + 36], 1; //tag read",
    "red": "red.global.add.u32 [g + 36], 1; //tag read",
    "cp.async": ".shared .align 16 .b8 mem[512]; .reg .b32 m; mov.u32 m, mem; mad.lo.u32 m, t, 4, m; mad.wide.u32 g, t, 4, g;\ncp.async.ca.shared.global [m], [g], 4; //tag read\ncp.async.wait_all;",
    "bulk": BULK,
    "reduction": REDUCE,
}


def finding(sim: S.Simulator, body: str, src: S.Buffer, dst: S.Buffer) -> tuple[str, int]:
    """What a launch over 32 lanes finds, and the line tagged `read`."""
    ptx, lines = program(PROLOGUE + body + "\nret;", PARAMETERS)
    try:
        sim.load(ptx).launch("k", src, dst, block=32)
    except S.SimulatorError as error:
        return str(error), lines["read"]
    return "", lines["read"]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("name", READS)
def test_a_read_of_unwritten_memory(sim: S.Simulator, name: str, seed: int) -> None:
    """All words but the tenth are written."""
    sim.configure(seed=seed)
    src, dst = sim.empty(64, np.uint32), sim.zeros(32, np.uint32)
    zeros = np.zeros(64, np.uint32)
    for first, last in ((0, 9), (10, 64)):
        sim.call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(src.pointer + 4 * first),
            zeros.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(4 * (last - first)),
        )
    message, line = finding(sim, READS[name], src, dst)
    assert "[uninitialized] kernel k, CTA (0, 0, 0), warp 0" in message, message
    assert f"PTX line {line} (" in message and "has written it" in message, message
    assert f"global memory 0x{src.pointer + 36:x} (byte 36 of allocation)" in message, message
    with sim.configured(check_uninitialized_global=False, seed=seed):
        assert not finding(sim, READS[name], src, dst)[0]
    sim.call("cuMemsetD32_v2", ctypes.c_uint64(src.pointer + 36), 0, ctypes.c_size_t(1))
    sim.configure(seed=seed)
    assert not finding(sim, READS[name], src, dst)[0]


WRITES = {
    "ld, st": "mad.wide.u32 h, t, 4, h; st.global.u32 [h], t;",
    "st.v4": "setp.gt.u32 p, t, 7; mad.wide.u32 h, t, 16, h; @!p st.global.v4.u32 [h], {t, t, t, t};",
    "bytes": "mad.wide.u32 h, t, 4, h; st.global.u8 [h], t; st.global.u16 [h + 2], t; st.global.u8 [h + 1], t;",
    "bulk": """.shared .align 128 .b8 mem[128]; .reg .b32 m; mov.u32 m, mem; mad.lo.u32 x, t, 4, m; st.shared.u32 [x], t; fence.proxy.async.shared::cta; bar.sync 0;
        setp.ne.u32 p, t, 0; @p bra $E; cp.async.bulk.global.shared::cta.bulk_group [h], [m], 128; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; $E:""",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_kernel_writes_memory_too(sim: S.Simulator, name: str) -> None:
    written = sim.empty(32, np.uint32)
    module = sim.load(S.kernel(PROLOGUE + WRITES[name] + "\nret;", parameters=PARAMETERS))
    module.launch("k", written, written, block=32)
    assert not finding(sim, READS["ld"], written, written)[0]


def test_a_store_writes_no_more_than_its_bytes(sim: S.Simulator) -> None:
    src = sim.empty(32, np.uint32)
    body = "mad.wide.u32 h, t, 4, h; st.global.u16 [h], t; st.global.u8 [h + 3], t;"
    module = sim.load(S.kernel(PROLOGUE + body + "\nret;", parameters=PARAMETERS))
    module.launch("k", src, src, block=32)
    assert "(byte 2 of allocation)" in finding(sim, READS["ld"], src, src)[0]


def test_a_copy_carries_what_is_written(sim: S.Simulator) -> None:
    src, other = sim.empty(32, np.uint32), sim.zeros(32, np.uint32)
    sim.call("cuMemsetD32_v2", ctypes.c_uint64(src.pointer), 1, ctypes.c_size_t(20))
    sim.call(
        "cuMemcpyDtoD_v2",
        ctypes.c_uint64(other.pointer),
        ctypes.c_uint64(src.pointer),
        ctypes.c_size_t(src.bytes),
    )
    assert "(byte 80 of allocation)" in finding(sim, READS["ld"], other, other)[0]


def test_registered_memory_counts_as_written(sim: S.Simulator) -> None:
    """Unless somebody says otherwise."""
    array = np.zeros(32, np.uint32)
    pointer, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
    address = ctypes.c_uint64(array.ctypes.data)
    sim.call("flash8_sim_register_memory", pointer, size)
    ptx, _ = program(PROLOGUE + READS["ld"] + "\nret;", PARAMETERS)
    module = sim.load(ptx)
    module.launch("k", address, address)
    sim.call(
        "flash8_sim_forget_memory", ctypes.c_void_p(array.ctypes.data + 40), ctypes.c_size_t(8)
    )
    with pytest.raises(S.SimulatorError, match=r"\[uninitialized\].*byte 40 of registered memory"):
        module.launch("k", address, address)
    sim.call("flash8_sim_unregister_memory", pointer)


TENSOR = """
.reg .pred p; .reg .b32 t, s, b; .reg .b64 m; .shared .align 128 .b8 mem[512]; .shared .align 8 .b64 bar;
mov.u32 t, %tid.x; mov.u32 s, mem; mov.u32 b, bar; setp.ne.u32 p, t, 0; @p bra $W; mov.b64 m, map; cvta.param.u64 m, m;
mbarrier.init.shared::cta.b64 [b], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 512;
cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [s], [m, {0, 0}], [b]; //tag read
$W: bar.sync 0; { .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [b], 0; @ok bra D; bra L; D: } ret;
"""


@pytest.mark.parametrize(("rows", "found"), [(8, True), (6, False)])
def test_a_tensor_load_reads_what_is_inside(sim: S.Simulator, rows: int, found: bool) -> None:
    """Six rows of eight are written: a box of eight may not reach into the tensor's last two."""
    src = sim.empty((8, 16), np.uint32)
    sim.call("cuMemsetD32_v2", ctypes.c_uint64(src.pointer), 1, ctypes.c_size_t(6 * 16))
    tensor = sim.tensor_map(src, dtype="u32", shape=(16, rows), strides=(64,), box=(16, 8))
    ptx, lines = program(TENSOR, ".param .align 64 .b8 map[128]")
    module = sim.load(ptx)
    if not found:
        module.launch("k", tensor)
        return
    with pytest.raises(S.SimulatorError) as error:
        module.launch("k", tensor)
    assert f"global memory 0x{src.pointer + 6 * 64:x} (byte 384 of allocation)" in str(error.value)
    assert f"PTX line {lines['read']} (" in str(error.value)
