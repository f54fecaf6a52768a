# ruff: noqa: E501 - PTX text reads better unbroken
"""st.async and red.async, from the PTX ISA: what they write, what they count, what orders them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import flash8_sim as S
from planted import SEEDS, fill, messages, must_find, program

MODULE = ".extern .shared .align 1024 .b8 mem[];"
BARRIER = 2048
COMPLETE = "mbarrier::complete_tx::bytes"
LETTER = {2: "h", 4: "x", 8: "d"}

# Each of two CTAs sends what it loads to the other one, `bytes` of a thread, and stores what has come.
EXCHANGE = f"""
.reg .b32 tid, cta, other, s, x<4>, to, bar, n, old; .reg .b64 g, o, d<4>, gto, gbar; .reg .b16 h<4>; .reg .pred p;
mov.u32 tid, %tid.x; mov.u32 cta, %cluster_ctarank; mov.u32 s, mem; xor.b32 other, cta, 1;
mad.lo.u32 n, tid, {{bytes}}, s; mov.u32 old, {{start}}; {{prepare}} //tag prepare
setp.ne.u32 p, tid, 0; @p bra $READY;
mbarrier.init.shared::cta.b64 [mem + {BARRIER}], 1; //tag init
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [mem + {BARRIER}], {{expected}};
$READY: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
mapa.shared::cluster.u32 to, {{target}}, other; add.u32 bar, s, {BARRIER}; mapa.shared::cluster.u32 bar, bar, other;
cvt.u64.u32 gto, n; cvta.shared.u64 gto, gto; mapa.u64 gto, gto, other; cvt.u64.u32 gbar, s; cvta.shared.u64 gbar, gbar; mapa.u64 gbar, gbar, other;
mad.lo.u32 other, cta, 32, tid; ld.param.u64 g, [src]; mad.wide.u32 g, other, {{bytes}}, g; {{load}}
ld.param.u64 o, [out]; mad.wide.u32 o, other, {{bytes}}, o;
{{send}} //tag send
{{wait}}
{{read}} //tag use
{{store}}
{{after}}
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;
"""
WAIT = f"{{ .reg .pred ok; L: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ok, [mem + {BARRIER}], 0; @ok bra D; bra L; D: }}"


def exchange(send: str, width: int, count: int = 1, **changes: str) -> tuple[str, dict[str, int]]:
    """`send` may name to and bar, gto and gbar, and the values {r}, of `width` bytes each."""
    registers = [f"{LETTER[width]}{i}" for i in range(count)]
    vector = "{" + ", ".join(registers) + "}" if count > 1 else registers[0]
    kind = f".v{count}.b{8 * width}" if count > 1 else f".b{8 * width}"
    parts = dict(
        bytes=str(width * count),
        expected=str(32 * width * count),
        prepare="",
        start="0",
        target="n",
        wait=WAIT,
        load=f"ld.global{kind} {vector}, [g];",
        read=f"ld.shared{kind} {vector}, [n];",
        store=f"st.global{kind} [o], {vector};",
        after="",
        send=send.replace("{r}", vector),
    )
    return program(fill(EXCHANGE, **(parts | changes)), ".param .u64 src, .param .u64 out", MODULE)


def run_exchange(sim: S.Simulator, module: S.Module, data: np.ndarray) -> np.ndarray:
    """`data`: of CTA 0 and of CTA 1; the result: what each of them received."""
    out = sim.zeros(data.shape, data.dtype)
    module.launch("k", sim.buffer(data), out, grid=2, cluster=2, shared=4096)
    return out.read()


STORES = [
    *[(4, 1, t) for t in ("b32", "u32", "s32", "f32")],
    *[(8, 1, t) for t in ("b64", "u64", "s64", "f64")],
    *[(4, 2, f"v2.{t}") for t in ("b32", "u32", "s32", "f32")],
    *[(8, 2, f"v2.{t}") for t in ("b64", "u64", "s64", "f64")],
    *[(4, 4, f"v4.{t}") for t in ("b32", "u32", "s32", "f32")],
]


@pytest.mark.parametrize(("width", "count", "form"), STORES)
@pytest.mark.parametrize(
    "text",
    [
        f"st.async.weak.shared::cluster.{COMPLETE}.{{form}} [to], {{r}}, [bar];",
        f"st.async.shared::cluster.{COMPLETE}.{{form}} [to], {{r}}, [bar];",
        f"st.async.{COMPLETE}.{{form}} [gto], {{r}}, [gbar + {BARRIER}];",
    ],
)
def test_st_async(sim: S.Simulator, text: str, form: str, width: int, count: int) -> None:
    module = sim.load(exchange(text.replace("{form}", form), width, count)[0])
    data = np.random.default_rng(0).integers(0, 2**31, (2, 32, width * count // 4), np.uint32)
    for seed in range(4):
        sim.configure(seed=seed)
        np.testing.assert_array_equal(run_exchange(sim, module, data), data[::-1])


def wrap(x: int, bits: int, signed: bool) -> int:
    x %= 2**bits
    return x - 2**bits if signed and x >= 2 ** (bits - 1) else x


REDUCTIONS: dict[str, tuple[tuple[str, ...], Callable[[int, int], int]]] = {
    "inc": (("u32",), lambda r, s: 0 if r >= s else r + 1),
    "dec": (("u32",), lambda r, s: s if r == 0 or r > s else r - 1),
    "min": (("u32", "s32"), min),
    "max": (("u32", "s32"), max),
    "and": (("b32",), lambda r, s: r & s),
    "or": (("b32",), lambda r, s: r | s),
    "xor": (("b32",), lambda r, s: r ^ s),
    "add": (("u32", "s32", "u64"), lambda r, s: r + s),
}


@pytest.mark.parametrize("start", [0, 3, 0xFFFFFFF0])
@pytest.mark.parametrize(
    ("operation", "form"), [(o, t) for o, (types, _) in REDUCTIONS.items() for t in types]
)
def test_red_async(sim: S.Simulator, operation: str, form: str, start: int) -> None:
    width, signed = int(form[1:]) // 8, form[0] == "s"
    prepare = (
        "st.shared.u32 [n], old;" if width == 4 else "cvt.u64.u32 d0, old; st.shared.u64 [n], d0;"
    )
    send = f"red.async.relaxed.cluster.shared::cluster.{COMPLETE}.{operation}.{form} [to], {{r}}, [bar];"
    module = sim.load(exchange(send, width, prepare=prepare, start=str(start))[0])
    rng = np.random.default_rng(1)
    data = rng.integers(0, 2 ** (8 * width), (2, 32), np.uint64).astype(f"u{width}")
    data[:, :4] = [0, 1, 3, 0xFFFFFFF0]
    apply = REDUCTIONS[operation][1]
    old = wrap(start, 8 * width, signed)
    want = [[apply(old, wrap(int(b), 8 * width, signed)) for b in row] for row in data[::-1]]
    for seed in range(3):
        sim.configure(seed=seed)
        got = run_exchange(sim, module, data)
        np.testing.assert_array_equal(
            got, np.array([[wrap(x, 8 * width, False) for x in row] for row in want], got.dtype)
        )


RED = f"red.async.relaxed.cluster.shared::cluster.{COMPLETE}"
ST = f"st.async.shared::cluster.{COMPLETE}"


@pytest.mark.parametrize("seed", range(6))
def test_reductions_of_many_lanes_meet_in_one_word(sim: S.Simulator, seed: int) -> None:
    """They are relaxed accesses with the scope of the cluster, so they do not race with one another."""
    send = f"{RED}.add.u32 [to], {{r}}, [bar];"
    ptx, _ = exchange(
        send, 4, target="s", prepare="st.shared.u32 [n], old;", read="ld.shared.u32 x0, [s];"
    )
    sim.configure(seed=seed)
    data = np.random.default_rng(2).integers(0, 99, (2, 32), np.uint32)
    got = run_exchange(sim, sim.load(ptx), data)
    np.testing.assert_array_equal(got, np.repeat(data[::-1].sum(1), 32).reshape(2, 32))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"st.async.shared::cluster.{COMPLETE}.v4.b64 [s], {{d, d, d, d}}, [s];", "128 bits"),
        (f"st.async.shared::cluster.{COMPLETE}.b16 [s], h, [s];", "st.async stores"),
        (f"st.async.shared::cluster.{COMPLETE}.b32 [s], d, [s];", "64 bits"),
        (f"st.async.shared::cta.{COMPLETE}.b32 [s], x, [s];", "in .shared::cluster"),
        ("st.async.shared::cluster.b32 [s], x, [s];", "expected one of .mbarrier::complete_tx"),
        (f"st.async.shared::cluster.{COMPLETE}.v2.b32 [s], x, [s];", "no vector of the stated"),
        ("st.async.release.gpu.global.b32 [d], x;", "needs sm_100"),
        ("red.async.release.gpu.global.add.u32 [d], x;", "needs sm_100"),
        (f"red.async.shared::cluster.{COMPLETE}.add.u32 [s], x, [s];", "expected one of .relaxed"),
        (f"red.async.relaxed.gpu.shared::cluster.{COMPLETE}.add.u32 [s], x, [s];", ".cluster"),
        (f"{RED}.inc.s32 [s], x, [s];", "red.async takes"),
        (f"{RED}.max.u64 [s], d, [s];", "red.async takes"),
        (f"{RED}.and.u32 [s], x, [s];", "red.async takes"),
        (f"{RED}.xor.b64 [s], d, [s];", "red.async takes"),
        (f"{RED}.add.f32 [s], x, [s];", "red.async takes"),
        (f"{RED}.exch.b32 [s], x, [s];", "red.async takes"),
        (f"{RED}.add.v2.u32 [s], {{x, x}}, [s];", "no vector of the stated"),
    ],
)
def test_forms_that_do_not_exist(sim: S.Simulator, text: str, words: str) -> None:
    body = f".reg .b16 h; .reg .b32 s, x; .reg .b64 d;\n{text} ret;"
    with pytest.raises(S.SimulatorError) as caught:
        sim.load(S.kernel(body))
    assert words in str(caught.value) and "PTX line 11" in str(caught.value)


SEND = f"{ST}.b32 [to], {{r}}, [bar];"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(send=SEND.replace("[to]", "[n]").replace("[bar]", f"[s + {BARRIER}]")),
            "executing CTA",
        ),
        (dict(send=SEND.replace("[to]", "[n]")), "another CTA than the destination"),
        (dict(send=SEND.replace("[to]", "[to + 2]")), "not aligned to 4"),
        (dict(send=SEND.replace("[bar]", "[bar + 4]")), "not aligned to 8"),
        (dict(send=SEND.replace("[bar]", "[bar + 8]")), "is no initialized mbarrier"),
        (dict(send=SEND.replace("[to]", "[to + 4096]")), "is outside the CTA's"),
        (dict(send=SEND.replace("[to]", f"[to + {BARRIER}]")), "holds a live mbarrier"),
        (dict(send=SEND.replace(".shared::cluster", "").replace("[to]", "[g]")), "not in shared"),
        (dict(load=""), "register that lanes 0xffffffff never wrote"),
        (dict(send=f"{RED}.add.u32 [to], x0, [bar];"), "nobody wrote it"),
        (dict(expected="124"), "expect_tx announced fewer bytes"),
        (dict(expected="132"), "4 bytes expected that no transfer brought"),
    ],
)
def test_faults_of_one_instruction(sim: S.Simulator, changes: dict, message: str) -> None:
    ptx, _ = exchange(changes.pop("send", SEND).replace("{r}", "x0"), 4, **changes)
    with pytest.raises(S.SimulatorError, match=message):
        run_exchange(sim, sim.load(ptx), np.zeros((2, 32), np.uint32))


def exchange_run(sim: S.Simulator, **changes: str) -> tuple[Callable[[], None], dict[str, int]]:
    ptx, lines = exchange(changes.pop("send", SEND), 4, **changes)
    module = sim.load(ptx)
    data = np.arange(64, dtype=np.uint32).reshape(2, 32)
    return lambda: np.testing.assert_array_equal(run_exchange(sim, module, data), data[::-1]), lines


@SEEDS
def test_the_exchange_is_right(sim: S.Simulator, seeds: int) -> None:
    run, _ = exchange_run(sim)
    assert not messages(sim, run, seeds)


def test_a_read_that_does_not_wait_is_found(sim: S.Simulator) -> None:
    run, lines = exchange_run(sim, wait="", prepare="st.shared.u32 [n], tid;", after=WAIT)
    at = [lines["use"], lines["send"]]
    must_find(sim, run, kinds=("race",), lines=at, words=("shared memory 0x", "mbarrier 0x"))
    assert len(messages(sim, run, 20)) == 20


def test_a_cluster_barrier_instead_of_the_mbarrier_is_found(sim: S.Simulator) -> None:
    """The barrier orders what the threads did, not the stores that they started."""
    wait = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    run, lines = exchange_run(sim, wait=wait, prepare="st.shared.u32 [n], tid;", after=WAIT)
    at = [lines["use"], lines["send"]]
    must_find(sim, run, kinds=("race",), lines=at, words=("shared memory 0x", "mbarrier 0x"))


def test_a_wait_with_the_scope_of_the_cta_does_not_acquire(sim: S.Simulator) -> None:
    run, lines = exchange_run(sim, wait=WAIT.replace(".acquire.cluster", ""))
    must_find(sim, run, kinds=("race",), lines=[lines["use"]], words=("shared memory 0x",))


def test_a_destination_that_is_still_read_is_found(sim: S.Simulator) -> None:
    """The other CTA prepares the word after the meeting, when the store may have come."""
    run, lines = exchange_run(sim, wait=f"st.shared.u32 [n], tid; //tag late\n{WAIT}")
    at = [lines["late"], lines["send"]]
    must_find(sim, run, kinds=("race",), lines=at, words=("shared memory 0x", "mbarrier 0x"))


def test_two_stores_of_one_phase_to_one_word_race(sim: S.Simulator) -> None:
    run, lines = exchange_run(sim, send=f"{SEND} {SEND}", expected="256")
    must_find(sim, run, kinds=("race",), lines=[lines["send"]], words=("shared memory 0x",))


def test_a_store_and_a_reduction_of_one_phase_race(sim: S.Simulator) -> None:
    red = f"{RED}.add.u32 [to], x0, [bar];"
    run, lines = exchange_run(
        sim, send=f"{SEND} {red}", expected="256", prepare="st.shared.u32 [n], tid;"
    )
    must_find(sim, run, kinds=("race",), lines=[lines["send"]], words=("shared memory 0x",))


def test_a_reduction_and_an_atomic_of_the_cta_race(sim: S.Simulator) -> None:
    red = f"{RED}.add.u32 [to], x0, [bar];"
    for scope, races in (("cta", True), ("cluster", False)):
        run, lines = exchange_run(
            sim,
            send=f"{red} red.relaxed.{scope}.shared::cta.add.u32 [n], 0;",
            prepare="st.shared.u32 [n], old;",
        )
        if races:
            must_find(sim, run, kinds=("race",), lines=[lines["send"]], words=("shared memory 0x",))
        else:
            assert not messages(sim, run, 12)


def test_the_senders_other_stores_are_not_ordered(sim: S.Simulator) -> None:
    """The completion is ordered after its own store alone, not after what the sender stored before."""
    send = f"st.shared::cluster.u32 [to + 512], tid; //tag plain\n{SEND}"
    run, lines = exchange_run(
        sim, send=send, read="ld.shared.u32 x0, [n]; ld.shared.u32 x1, [n + 512];"
    )
    at = [lines["use"], lines["plain"]]
    kinds = ("race", "uninitialized")
    must_find(sim, run, kinds=kinds, lines=at, words=("shared memory 0x",))


PROXY = """fence.proxy.async.shared::cta; bar.warp.sync -1; @p bra $NO; ld.param.u64 g, [out]; mad.wide.u32 g, cta, 128, g;
cp.async.bulk.global.shared::cta.bulk_group [g], [s], 128; //tag bulk
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; $NO:"""


def test_an_engine_that_reads_what_came_needs_a_proxy_fence(sim: S.Simulator) -> None:
    """st.async writes in the generic proxy."""
    run, _ = exchange_run(sim, read="", store="", after=PROXY)
    assert not messages(sim, run, 12)
    bare = PROXY.replace("fence.proxy.async.shared::cta;", "")
    run, lines = exchange_run(sim, read="", store="", after=bare)
    words = ("shared memory 0x", "fence.proxy.async", f"PTX line {lines['send']}")
    must_find(sim, run, kinds=("proxy-fence",), lines=[lines["bulk"]], words=words)


def test_a_receiver_that_has_exited_is_found(sim: S.Simulator) -> None:
    leave = f"setp.eq.u32 p, cta, 0; @p bra $SEND; ret; $SEND: {SEND}"
    run, _ = exchange_run(sim, send=leave)
    found = messages(sim, run, 8)
    assert found and all("exited" in text for text in found)


def test_the_initialization_must_be_known_to_the_sender(sim: S.Simulator) -> None:
    ptx, lines = exchange(SEND, 4)
    meet = "$READY: barrier.cluster.arrive.aligned;"
    assert meet in ptx
    relaxed = ptx.replace(meet, meet.replace("arrive", "arrive.relaxed"))
    module = sim.load(relaxed.replace("fence.mbarrier_init.release.cluster;", ""))
    data = np.zeros((2, 32), np.uint32)
    found = messages(sim, lambda: run_exchange(sim, module, data) and None, 8)
    assert found and all("is initialized by warp 0" in text for text in found), found
    assert f"PTX line {lines['init']}" in found[0]
