"""The GEMM kernel whose CTAs share B by multicast, on the simulated device: the bits of the one
without clusters."""

import pytest
import torch

from defaults import by_default
from flash8 import _native
from flash8.backends.hopper.gemm_variants import CLUSTERED_GEMMS, SHIPPED_GEMMS, GemmVariant
from flash8.backends.hopper.verify import trust
from gemm_cases import assert_same, changed_text, device, emulated, is_caught, make, on_kernel
from simulated_device import missing_compiler

needs_a_compiler = pytest.mark.skipif(
    missing_compiler() is not None, reason=str(missing_compiler())
)
BF16, FP32 = torch.bfloat16, torch.float32
PAIR = GemmVariant("block", 128, 128, cluster=True)
#: One block of rows, so that the second CTA has none; two and three; more blocks than stages; more
#: tiles than CTAs, in bands.
SIZES = [(1, 1, 16), (129, 131, 272), (300, 64, 1168), (640, 290, 144)]


def granularity(kernel):
    return "1x128" if kernel.scales == "block" else "row"


@needs_a_compiler
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", by_default(CLUSTERED_GEMMS, [PAIR]), ids=lambda v: v.name)
def test_sizes(monkeypatch, kernel, sizes):
    options = {"fast": kernel.fast_accum, "out_dtype": BF16, "bias": FP32}
    product = make(*sizes, granularity(kernel), **options)
    assert_same(on_kernel(monkeypatch, product, kernel), emulated(product))


@needs_a_compiler
@pytest.mark.parametrize("kernel", by_default(CLUSTERED_GEMMS, [PAIR]), ids=lambda v: v.name)
def test_other_schedules(monkeypatch, kernel):
    product = make(200, 140, 912, granularity(kernel), fast=kernel.fast_accum, seed=7)
    want = emulated(product)
    for seed in range(1, 7):
        assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), want)


@needs_a_compiler
def test_rows_that_share_scales_and_nan(monkeypatch):
    """Of the second CTA's rows, and a column of the first one's half of B."""
    product = make(270, 140, 400, "128x128")
    product.a.view(torch.uint8)[133, 200] = 0x7F  # NaN
    product.b.view(torch.uint8)[100, 7] = 0xFF
    found = on_kernel(monkeypatch, product, PAIR)
    assert_same(found, emulated(product))
    assert found[133].isnan().all() and found[:, 7].isnan().all()
    assert not found[:133, :7].isnan().any()


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kernel", CLUSTERED_GEMMS, ids=lambda v: v.name)
def test_no_false_alarm_in_40_seeds(monkeypatch, kernel):
    product = make(300, 150, 784, granularity(kernel), fast=kernel.fast_accum)
    want = emulated(product)
    for seed in range(40):
        assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), want)


#: Of the PTX: nothing is compiled.
EDITS = {
    "a CTA that begins before the other": (
        r"(?s)barrier\.cluster\.arrive\.release;\s*barrier\.cluster\.wait\.acquire;(.*)",
        r"\1",
    ),
    "a stage that the other CTA has not released": (
        r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), %r\d+;",
        r"mapa.shared::cluster.u32 \1, \2, %cluster_ctarank;",
    ),
    "a half for itself alone": (r"(multicast::cluster [^;]*), %rs\d+;", r"\1, 1;"),
}


@needs_a_compiler
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_caught(monkeypatch, name):
    product = make(200, 140, 1552)
    text = changed_text(PAIR, *EDITS[name])
    registry = _native.Registry(device().driver, lambda key, kind: text)
    monkeypatch.setattr(device(), "_registry", registry)
    assert is_caught(
        lambda seed: on_kernel(monkeypatch, product, PAIR, seed=seed), emulated(product)
    )


@needs_a_compiler
@pytest.mark.parametrize("kernel", by_default(CLUSTERED_GEMMS, [PAIR]), ids=lambda v: v.name)
def test_a_sound_kernel_passes(kernel, monkeypatch):
    with device().serving_cpu_tensors(monkeypatch):
        assert trust.find_fault(kernel, torch.device("cpu")) is None


def test_no_call_takes_it_yet():
    assert not any(variant.cluster for variant in SHIPPED_GEMMS)


def test_what_a_cluster_cannot_be():
    for options in ({"small_m": True}, {"grouped": True}):
        block_m = 16 if "small_m" in options else 128
        with pytest.raises(ValueError, match="cluster is True; supported is a kernel for many"):
            GemmVariant("block", block_m, 128, cluster=True, **options)
    assert PAIR.name == "gemm_block_cluster_128x128"
    assert ("FLASH8_CLUSTER", "1") in PAIR.defines
