"""The forward kernel on the simulated device, against the float64 oracle.

Every launch has its tensors in the device's memory with NaN behind them, outputs poisoned with NaN,
and an adversarial schedule per seed; a finding of the simulator (a race, a missing wait, a read of
something unwritten, an access out of bounds) fails the launch.
"""

import functools
import math

import pytest
import torch
from torch import Tensor

import flash8
import oracle
from flash8.variants import SHIPPED, ForwardVariant
from forward_launch import Call, ForwardKernel
from simulated_device import SimulatedDevice, missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal")
LOCAL = ForwardVariant("bf16", 64, 64, mask="local")
CAPPED = ForwardVariant("fp16", 64, 64, softcap=True)
MLA = ForwardVariant("bf16", 192, 128, mask="causal")
DEFAULT = (CAUSAL, LOCAL, CAPPED, MLA)
SLOW = tuple(variant for variant in SHIPPED if variant not in DEFAULT)
VARIANTS = [pytest.param(v, id=v.name) for v in DEFAULT] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in SLOW
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Largest difference of O from float64 attention on the same 16-bit inputs with values of V near
#: 1: half a unit of the output's last place, P's rounding, and ex2.approx. LSE is fp32.
O_BOUND = {"bf16": 1.6e-2, "fp16": 2e-3}
LSE_BOUND = {"atol": 3e-6, "rtol": 5e-7}  # a few units of fp32's last place


@functools.cache
def device() -> SimulatedDevice:
    return SimulatedDevice()


@functools.cache
def kernel(variant: ForwardVariant) -> ForwardKernel:
    return ForwardKernel(device().driver, device().ptx(variant))


def draw(
    variant: ForwardVariant, rows_q, rows_k, heads, heads_kv, *, batch=None, seed=0, scale=1.0
):
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)

    def tensor(rows: int, heads: int, head_dim: int) -> Tensor:
        x = torch.randn((*lead, rows, heads, head_dim), generator=generator)
        return x.to(DTYPES[variant.dtype])

    q, k = tensor(rows_q, heads, variant.head_dim), tensor(rows_k, heads_kv, variant.head_dim)
    return q * scale, k, tensor(rows_k, heads_kv, variant.head_dim_v)


def masks(variant: ForwardVariant) -> dict:
    window = (37, 21) if variant.mask == "local" else (-1, -1)
    return {
        "causal": variant.mask == "causal",
        "window": window,
        "softcap": 3.0 if variant.softcap else 0.0,
    }


def launch(variant: ForwardVariant, call: Call, *, seed: int = 0, num_ctas: int = 2):
    device().configure(seed=seed)
    try:
        return kernel(variant)(call, num_ctas=num_ctas)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error


def expected(call: Call, q, k, v) -> tuple[Tensor, Tensor]:
    """Float64 O and LSE of one sequence, (rows, heads, d) each."""
    mask = oracle.visible(q.shape[0], k.shape[0], call.causal, call.window)
    sink = None if call.s_aux is None else call.s_aux.double()
    return oracle.attend(
        q.double(), k.double(), v.double(), mask, call.softmax_scale, call.softcap, sink=sink
    )


def compare(variant: ForwardVariant, o: Tensor, lse: Tensor, want: tuple[Tensor, Tensor]) -> None:
    assert not o.isnan().any(), "a row of O was not written, or NaN leaked"
    assert (o.double() - want[0]).abs().max() <= O_BOUND[variant.dtype]
    empty = want[1] == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    torch.testing.assert_close(lse.double()[~empty], want[1][~empty], **LSE_BOUND)


def check_dense(variant, call: Call, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    o, lse = launch(variant, call, seed=seed)
    for b in range(call.q.shape[0]):
        compare(variant, o[b], lse[b], expected(call, call.q[b], call.k[b], call.v[b]))
    return o, lse


SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 127, 129, 1, 1),
    (1, 113, 203, 2, 1),
    (2, 193, 131, 2, 2),
    (1, 200, 50, 1, 1),
    (1, 64, 257, 3, 1),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(variant, shape):
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    q, k, v = draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch)
    call = Call(q, k, v, variant.head_dim**-0.5, **masks(variant))
    first = check_dense(variant, call, seed=0)
    for seed in (1, 2):
        again = check_dense(variant, call, seed=seed)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_with_used_lengths_and_poisoned_padding(variant):
    lengths, used_q, used_k = [5, 0, 130, 1, 64], [5, 0, 99, 0, 64], [3, 0, 77, 1, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(offsets[-1])
    q, k, v = draw(variant, total, total, 2, 1)
    clean_k, clean_v = k.clone(), v.clone()
    for start, length, used in zip(offsets.tolist(), lengths, used_k, strict=False):
        k[start + used : start + length] = math.nan
        v[start + used : start + length] = math.nan
    indices = {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "seqused_q": torch.tensor(used_q, dtype=torch.int32),
        "seqused_k": torch.tensor(used_k, dtype=torch.int32),
    }
    call = Call(
        q,
        k,
        v,
        variant.head_dim**-0.5,
        **masks(variant),
        indices=indices,
        max_seqlen_q=130,
        max_seqlen_k=130,
    )
    o, lse = launch(variant, call, num_ctas=3)
    for b, start in enumerate(offsets.tolist()[:-1]):
        rows, keys = slice(start, start + used_q[b]), slice(start, start + used_k[b])
        want = expected(call, q[rows], clean_k[keys], clean_v[keys])
        if used_q[b]:
            compare(variant, o[rows], lse[:, rows], want)
        unused = slice(start + used_q[b], start + lengths[b])
        assert not o[unused].any()
        assert (lse[:, unused] == -math.inf).all()


def test_left_padding_and_cache_rows():
    q, k, v = draw(CAUSAL, 40, 150, 2, 2, batch=2)
    leftpad, used, rows = [7, 0], [150, 33], [1, 0]
    clean_k, clean_v = k.clone(), v.clone()
    for b in range(2):
        for x in (k, v):
            x[rows[b], : leftpad[b]] = math.nan
            x[rows[b], used[b] :] = math.nan
    given = {"leftpad_k": leftpad, "seqused_k": used, "kv_batch_idx": rows}
    indices = {name: torch.tensor(values, dtype=torch.int32) for name, values in given.items()}
    call = Call(q, k, v, 0.1, causal=True, indices=indices)
    o, lse = launch(CAUSAL, call)
    for b in range(2):
        keys = slice(leftpad[b], used[b])
        want = expected(call, q[b], clean_k[rows[b], keys], clean_v[rows[b], keys])
        compare(CAUSAL, o[b], lse[b], want)


@pytest.mark.parametrize("variant", [CAUSAL, LOCAL, CAPPED], ids=lambda v: v.name)
def test_sinks(variant):
    q, k, v = draw(variant, 70, 130, 2, 1, batch=1)
    sinks = torch.tensor([0.5, 9.0])
    call = Call(q, k, v, variant.head_dim**-0.5, **masks(variant), s_aux=sinks)
    check_dense(variant, call)


def test_extreme_logits():
    q, k, v = draw(CAUSAL, 130, 190, 1, 1, batch=1, scale=40.0)
    check_dense(CAUSAL, Call(q, k, v, 128**-0.5, causal=True))


def test_head_dim_is_filled_with_zeros():
    variant = CAUSAL
    q, k, v = (x[..., :72].contiguous() for x in draw(variant, 100, 140, 2, 1, batch=1))
    check_dense(variant, Call(q, k, v, 72**-0.5, causal=True))


def test_many_seeds_give_the_same_bits():
    q, k, v = draw(CAUSAL, 130, 260, 1, 1, batch=1)
    call = Call(q, k, v, 128**-0.5, causal=True)
    first = launch(CAUSAL, call, seed=0)
    for seed in range(1, 12):
        o, lse = launch(CAUSAL, call, seed=seed)
        assert torch.equal(o, first[0])
        assert torch.equal(lse, first[1])


def mutated_call(mutation: str) -> Call:
    q, k, v = draw(CAUSAL, 100, 200, 1, 1, batch=1)
    scale, causal = 128**-0.5, True
    if mutation == "scale":
        scale *= 1.05
    elif mutation == "mask off by one":
        k, v = torch.cat((k[:, 1:], k[:, :1]), 1), torch.cat((v[:, 1:], v[:, :1]), 1)
    elif mutation == "no mask":
        causal = False
    elif mutation == "zero v":
        v = torch.zeros_like(v)
    return Call(q, k, v, scale, causal=causal)


@pytest.mark.parametrize("mutation", ["scale", "mask off by one", "no mask", "zero v"])
def test_the_bounds_catch(mutation):
    q, k, v = draw(CAUSAL, 100, 200, 1, 1, batch=1)
    good = Call(q, k, v, 128**-0.5, causal=True)
    if mutation == "no mask":
        variant = ForwardVariant("bf16", 64, 64, mask="local")
        q, k, v = draw(variant, 100, 200, 1, 1, batch=1)
        good = Call(q, k, v, 64**-0.5, causal=True)
        o, lse = launch(variant, Call(q, k, v, 64**-0.5))
    else:
        variant = CAUSAL
        o, lse = launch(variant, mutated_call(mutation))
    with pytest.raises(AssertionError):
        compare(variant, o[0], lse[0], expected(good, q[0], k[0], v[0]))


def test_the_public_function_runs_on_the_kernel(monkeypatch):
    q, k, v = draw(CAUSAL, 150, 150, 4, 2, batch=2)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert device().report()["kernel"] == "flash8_forward"
    call = Call(q, k, v, 128**-0.5, causal=True)
    for b in range(2):
        compare(CAUSAL, o[b], lse[b], expected(call, q[b], k[b], v[b]))


def test_gradients_flow_through_the_kernels_lse(monkeypatch):
    tensors = [x.requires_grad_() for x in draw(CAUSAL, 60, 90, 2, 1, batch=1)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with device().serving_cpu_tensors(monkeypatch):
        o = flash8.flash_attn_func(*tensors, causal=True)
    dout = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(o.dtype)
    gradients = torch.autograd.grad(o, tensors, dout)
    reference = flash8.flash_attn_func(*exact, causal=True)
    for have, want in zip(
        gradients, torch.autograd.grad(reference, exact, dout.double()), strict=True
    ):
        assert ((have.double() - want).norm() / want.norm()) < 1e-2
