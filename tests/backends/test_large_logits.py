"""Logits of up to 4e8: the offset of e4m3's P, a row's reference and LSE stay right beside them.

Scores are exact in the 14 bits of FP8's accumulator, and the largest is held by several keys in
several blocks: their values have to come out in equal parts.
"""

import math

import pytest
import torch
from torch import Tensor

import flash8
import oracle
from defaults import by_default
from flash8.backends.cpu.softmax import BlockLocalSoftmax
from flash8.backends.hopper.variants import ForwardVariant
from flash8.tensors.float8 import saturating_cast
from forward_cases import launch, reference
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_kernel
from simulated_device import missing_compiler
from tolerances import Bound, rel_l2

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

DENSE = ForwardVariant("e4m3", 128, 128, scales="head")
BLOCKS = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
BF16 = ForwardVariant("bf16", 128, 128, mask="causal")
SIZES = [1e3, 4e5, 7e5, 1e8, 4e8]  # beside 1e8, half a unit of the last place is 8
#: Of 1e3 the smaller ones count as well, in e4m3.
O_BOUNDS = {
    1e3: Bound(0.02, 0.0075, "O of large logits"),
    4e5: Bound(0.004, 0.002, "O of large logits"),
    7e5: Bound(0.004, 0.002, "O of large logits"),
    1e8: Bound(0.004, 0.002, "O of large logits"),
    4e8: Bound(0.004, 0.002, "O of large logits"),
}
ROWS, KEYS = 70, 700
TOP = 4096.0  # of a score before it is scaled


def call_of(variant: ForwardVariant, size: float) -> Call:
    """Scores are +-4096 m - 2 j of `size` / 4096, with j from 0 to 3, and m from 1 to below 4 by
    row."""
    generator = torch.Generator().manual_seed(0)
    fp8 = variant.dtype == "e4m3"
    q = torch.zeros(1, ROWS, 1, 128)
    k = torch.zeros(1, KEYS, 1, 128)
    steps = torch.arange(ROWS)
    q[0, :, 0, 0] = (64.0 + 8.0 * (steps % 8)) * 2.0 ** (steps % 3 // 2)
    q[..., 1] = 1.0
    q[:, 1::2, :, 0] *= -1.0
    k[..., 0] = 64.0
    k[0, :, 0, 1] = -2.0 * torch.randint(0, 4, (KEYS,), generator=generator)
    k[0, 230:460, 0, 1] = -2.0  # a block and more without the largest
    v = torch.randn(1, KEYS, 1, 128, generator=generator)
    scale = size / TOP
    if not fp8:
        return Call(*(x.bfloat16() for x in (q, k, v)), scale, causal=True)
    shape = (1, 1, -(-KEYS // 128)) if variant.scales == "block" else (1, 1)
    ones = torch.ones(shape)
    scales = {
        "q_descale": ones[..., : -(-ROWS // 128)] * (scale * 128.0),
        "k_descale": ones / 4.0,
        "v_descale": ones / 32.0,
    }
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v * 32.0))
    causal = variant.mask == "causal"
    return Call(q, k, v, 1.0 / 32.0, causal=causal, descales=scales)


def check(call: Call, o: Tensor, lse: Tensor, size: float) -> None:
    exact, exact_lse = reference(call)
    assert torch.isfinite(o).all() and torch.isfinite(lse).all()
    O_BOUNDS[size].check("O", rel_l2(o, exact))
    error = (lse.double() - exact_lse).abs().max().item()
    assert error <= 1e-3 + 4e-7 * size, f"LSE is off by {error} at logits of {size}"


def attend(call: Call, **given: Tensor) -> tuple[Tensor, Tensor]:
    """O and LSE of the CPU backend."""
    return flash8.flash_attn_func(
        call.q,
        call.k,
        call.v,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        return_attn_probs=True,
        **call.descales,
        **given,
    )


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", [DENSE, BLOCKS, BF16], ids=lambda v: v.name)
def test_kernel(variant, size):
    call = call_of(variant, size)
    check(call, *launch(variant, call), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", [DENSE, BLOCKS, BF16], ids=lambda v: v.name)
def test_cpu(variant, size):
    call = call_of(variant, size)
    check(call, *attend(call), size)


@pytest.mark.parametrize("size", SIZES)
def test_a_sink_beside_them(size):
    """It takes everything of a row whose logits are negative, and nothing of the others."""
    call = call_of(DENSE, size)
    sink = torch.tensor([size / 2.0])
    o, lse = attend(call, s_aux=sink)
    exact, exact_lse = oracle.attention(
        call.q, call.k, call.v, softmax_scale=call.softmax_scale, s_aux=sink, **call.descales
    )
    O_BOUNDS[size].check("O", rel_l2(o, exact))
    assert (lse.double() - exact_lse).abs().max().item() <= 1e-3 + 3e-7 * size


MUTATIONS = {
    "products are not exact": (
        DENSE,
        7e5,
        ("attention/softmax_fp8.cuh", "kExact = 65536.0f;", "kExact = INFINITY;"),
    ),
    "tiles never have large scores": (
        DENSE,
        4e8,
        ("attention/key_walk.cuh", "mask_all ? blocks.begin", "false ? blocks.begin"),
    ),
    "the reference lacks the offset": (
        DENSE,
        7e5,
        ("attention/softmax_fp8.cuh", "reference = largest - offset;", "reference = largest;"),
    ),
    "the rescaling is not rounded": (
        BF16,
        7e5,
        (
            "attention/softmax.cuh",
            "ptx::exp2(row_max_log2_[r] -",
            "ptx::exp2(__fmaf_rn(previous, scale_log2_, -offset)); //",
        ),
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", by_default(MUTATIONS, []))
def test_the_bounds_catch(name, tmp_path):
    variant, size, edit = MUTATIONS[name]
    call = call_of(variant, size)
    changed = changed_kernel(tmp_path, variant, edit)
    with pytest.raises(AssertionError):
        check(call, *changed(call, Schedule()), size)


LSES = {
    "the offset of P": lambda lse: lse + 8.0 * math.log(2.0),
    "of the next row": lambda lse: lse.roll(1, -1),
    "one unit of FP8's accumulator": lambda lse: lse * (1.0 + 2.0**-13),
}


@needs_compiler
@pytest.mark.parametrize("wrong", LSES)
@pytest.mark.parametrize("variant", [DENSE, BF16], ids=lambda v: v.name)
def test_the_bounds_catch_lse(variant, wrong):
    size = 1e3
    call = call_of(variant, size)
    o, lse = launch(variant, call)
    check(call, o, lse, size)
    with pytest.raises(AssertionError, match="LSE"):
        check(call, o, LSES[wrong](lse), size)


def test_the_bounds_catch_an_offset_beside_the_reference(monkeypatch):
    """As the portable code had it."""

    def step(self: BlockLocalSoftmax, s: Tensor) -> tuple[Tensor, Tensor]:
        beside = s * (1.0 / math.log(2.0))
        reference = torch.maximum(beside.amax(dim=-1), self._row_max - 24.0)
        before = self._row_sum.clone()
        p, alpha = original(self, s)
        wrong = beside.sub_(reference[..., None] - 8.0).exp2_()
        self._row_sum = before * alpha + wrong.sum(dim=-1)
        return saturating_cast(wrong).to(p.dtype), alpha

    original = BlockLocalSoftmax.step
    call = call_of(DENSE, 1e8)
    monkeypatch.setattr(BlockLocalSoftmax, "step", step)
    found = attend(call)
    with pytest.raises(AssertionError):
        check(call, *found, 1e8)
