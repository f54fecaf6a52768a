"""Every kernel without one piece of its synchronization at a time: its cases notice, or the list of
survivors says why they cannot.

`python -m flash8_sim.mutate` is the engine, survivors/ has a list for each family. Where families
are of one kernel (FOUNDED_ON), a reason stands in one list for all of them.
"""

from pathlib import Path

import pytest

from flash8.backends.hopper.decode_variants import SHIPPED_DECODERS, WIDEST_OF_WARP, DecodeVariant
from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS, QuantizeVariant
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8_sim.mutate import Known, compare, judge, load, mutations
from mutation_families import FAMILIES, FOUNDED_ON, Decode, Forward, Quantizer, own_mutants
from simulated_device import missing_compiler

pytestmark = pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
LISTS = Path(__file__).resolve().parent / "survivors"

#: One mutant of the 16-bit kernel each: the first whose id begins so.
SAMPLES = (
    "deleted mbarrier.try_wait",
    "relaxed mbarrier.try_wait",
    "parity mbarrier.try_wait",
    "deleted mbarrier.arrive.shared",
    "bytes -16 mbarrier.arrive.expect_tx",
    "count - 1 mbarrier.init",
    "one more pending wgmma.wait_group",
    "deleted fence.proxy.async",
    "deleted fence.mbarrier_init",
    "count -32 bar.sync",
    "registers + 8 setmaxnreg.dec",
    "everyone bra",
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_survivor_is_explained(family):
    # A forward kernel is large: what others of its kind have as well is judged there.
    chosen = own_mutants(family) if isinstance(family, Forward) else mutations(family.ptx())
    results = list(judge(family.ptx(), family.cases(), only=chosen))
    survivors = {r.mutation.id for r in results if r.verdict == "survived"}
    why = load(LISTS / f"{family.name}.toml").why
    for name in FOUNDED_ON.get(family.name, ()):
        others = load(LISTS / f"{name}.toml").why
        why |= {name: others[name] for name in survivors & others.keys() - why.keys()}
    wrong = compare(results, Known(why))
    assert not wrong, "\n".join(wrong)


@needs_compiler
def test_samples_of_the_16_bit_kernel():
    family = FAMILIES[0]
    every = mutations(family.ptx())
    chosen = [next(m for m in every if m.id.startswith(sample)) for sample in SAMPLES]
    listed = load(LISTS / f"{family.name}.toml").why
    survivor = next(m for m in every if m.id in listed)
    results = list(judge(family.ptx(), family.cases(), only=[*chosen, survivor]))
    expected = ["survived" if r.mutation.id in listed else "killed" for r in results]
    assert [r.verdict for r in results] == expected, "\n".join(map(str, results))
    assert expected.count("killed") >= len(SAMPLES) - 2


@needs_compiler
def test_samples_of_the_decode_kernel():
    """A slot that nobody waits for, and a ticket that two CTAs take."""
    family = next(family for family in FAMILIES if family.name == "decode_fp8")
    every = mutations(family.ptx())
    samples = ("deleted mbarrier.try_wait", "not atomic")
    chosen = [next(m for m in every if m.id.startswith(sample)) for sample in samples]
    results = list(judge(family.ptx(), family.cases(), only=chosen))
    assert [r.verdict for r in results] == ["killed"] * 2, "\n".join(map(str, results))


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_lists_name_mutants_that_exist(family):
    if isinstance(family, Forward) and family is not FAMILIES[0]:
        pytest.skip("it would be compiled for this alone")
    there = {m.id for m in own_mutants(family)}
    assert {*load(LISTS / f"{family.name}.toml").why} <= there


def test_every_list_has_its_family():
    assert {path.stem for path in LISTS.glob("*.toml")} == {family.name for family in FAMILIES}
    for path in LISTS.glob("*.toml"):
        assert isinstance(load(path), Known)


def test_every_shipped_kernel_is_of_a_family():
    """The choices that change how a kernel synchronizes; the others change what it computes."""

    def of_forward(v: ForwardVariant) -> tuple[object, ...]:
        return v.dtype == "e4m3", v.v_colmajor, v.cluster, v.cache

    def of_decode(v: DecodeVariant) -> tuple[object, ...]:
        return v.load, v.head_dim_v > WIDEST_OF_WARP, v.scales, v.append

    forward = {of_forward(f.variant) for f in FAMILIES if isinstance(f, Forward)}
    assert {of_forward(v) for v in SHIPPED} <= forward
    decode = {of_decode(f.variant) for f in FAMILIES if isinstance(f, Decode)}
    assert {of_decode(v) for v in SHIPPED_DECODERS} <= decode
    others = [f.variant for f in FAMILIES if isinstance(f, Quantizer)]
    served = {(v.job, v.v_colmajor) for v in others if isinstance(v, QuantizeVariant)}
    assert {(v.job, v.v_colmajor) for v in SHIPPED_QUANTIZERS} <= served
