"""Addresses beyond 2^31 elements: the forward kernel over sparse memory, on the simulated device.

Rows, heads or batch entries stand so far apart that 32 bits cannot count the elements between them;
only the pages that are touched exist. O and LSE must be those of the same call on dense tensors, to
the bit, and a stride that has lost its upper half must give something else.
"""

import math

import pytest
import torch

import forward_cases
from flash8 import _native
from flash8.backends.hopper import attention_params
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call.options import Options
from flash8.compiler import Unit, compile_unit
from forward_cases import int32
from fp8_forward_cases import changed_sources
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

VARIANT = ForwardVariant(dtype="bf16", head_dim=64, head_dim_v=64, mask="causal")
BATCH, ROWS, HEADS, DIM = 2, 150, 2, 64
#: Elements between neighbours. Truncated to 32 bits it stays a stride that is in bounds.
FAR = 2**32 + 4096
STEP = 2**25 + 256  # between rows: the last ones are beyond 2^32
STRIDES = {
    "batch": (FAR, HEADS * DIM, DIM),
    "head": (ROWS * DIM, DIM, FAR),
    "row": (HEADS * DIM, STEP, DIM),
}
LSE_STRIDES = {"batch": (FAR, ROWS, 1), "head": (ROWS, FAR, 1), "row": (HEADS * ROWS, ROWS, 1)}


def call_on(tensors: dict[str, torch.Tensor]) -> _native.ForwardParams:
    q, k, v, o, lse = (tensors[name] for name in ("q", "k", "v", "o", "lse"))
    return hopper._describe(q, k, v, {}, Options(window_right=0), o, lse)


def run(
    tensors: dict[str, torch.Tensor], call: _native.ForwardParams, image: bytes | None = None
) -> list[torch.Tensor]:
    device = forward_cases.device()
    tensors["o"].fill_(math.nan)
    tensors["lse"].fill_(math.nan)
    device.configure(seed=3, strict_global=False)
    try:
        library = _native.Library(device.driver, image or device.ptx(VARIANT))
        _native.launch_forward(library.kernel(), 0, 0, call)
        device.driver.synchronize()
    finally:
        device.configure()
    return [tensors[name].clone(memory_format=torch.contiguous_format) for name in ("o", "lse")]


@pytest.fixture(scope="module")
def dense() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (BATCH, ROWS, HEADS, DIM)
    drawn = {n: torch.randn(shape, generator=generator).bfloat16() for n in ("q", "k", "v")}
    return {**drawn, "o": torch.empty(shape).bfloat16(), "lse": torch.empty(BATCH, HEADS, ROWS)}


def spread(dense: dict[str, torch.Tensor], far: str) -> dict[str, torch.Tensor]:
    """The same tensors with a large stride in one dimension, LSE with its own."""
    result = {}
    for name, x in dense.items():
        strides = LSE_STRIDES[far] if name == "lse" else (*STRIDES[far], 1)
        result[name] = sparse(tuple(x.shape), strides, x.dtype).copy_(x)
    return result


@pytest.mark.parametrize("far", STRIDES)
def test_addresses_beyond_2_to_the_31_elements(dense, far):
    expected = run(dense, call_on(dense))
    assert not any(x.isnan().any() for x in expected)
    tensors = spread(dense, far)
    call = call_on(tensors)
    index = {"batch": 1, "head": 3, "row": 2}[far]
    last = {"batch": BATCH, "head": HEADS, "row": ROWS}[far] - 1
    for name in ("q", "k", "v", "o"):
        assert getattr(call, name)[index] * last > 2**31
    for got, want in zip(run(tensors, call), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "lse"])
@pytest.mark.parametrize("far", ["batch", "head"])
def test_a_stride_of_32_bits_is_noticed(dense, far, name):
    expected = run(dense, call_on(dense))
    tensors = spread(dense, far)
    call = call_on(tensors)
    address, *strides = getattr(call, name)
    setattr(call, name, (address, *(stride % 2**32 for stride in strides)))
    try:
        results = run(tensors, call)
    except _native.DriverError:
        # CTAs that meet in one place are a race, which the simulated device stops at.
        assert "race" in str(forward_cases.device().report())
        return
    assert not all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


GATHERED = ForwardVariant("bf16", 128, 128, mask="causal", paged=True, gather=True)
PAGE = 5
CACHE_STRIDES = {
    "page": (FAR, HEADS * 128, 128, 1),
    "head": (PAGE * HEADS * 128, HEADS * 128, FAR, 1),
    "row": (HEADS * 128, 2**30 + 256, 128, 1),
}


def gathered(far: str, image: bytes) -> list[list[torch.Tensor]]:
    """O and LSE of two sequences over pages, which lie next to each other, and far apart."""
    generator = torch.Generator().manual_seed(7)
    q = torch.randn((2, 40, HEADS, 128), generator=generator).bfloat16()
    pages = [torch.randn((5, PAGE, HEADS, 128), generator=generator).bfloat16() for _ in "kv"]
    spread = [sparse((5, PAGE, HEADS, 128), CACHE_STRIDES[far], x.dtype).copy_(x) for x in pages]
    lengths = {"seqused_k": int32([2 * PAGE - 1, 2])}
    table = int32([4, 0, 3, 1]).view(2, 2)
    options = Options(window_right=0, page_table=table, **lengths)
    found = []
    for k, v in (pages, spread):
        outputs = {"o": torch.empty_like(q), "lse": torch.empty(2, HEADS, 40)}
        call = hopper._describe(q, k, v, lengths, options, *outputs.values())
        held = attention_params.describe_pages(call, k, options)
        found.append(run(outputs, call, image))
        assert held
    return found


@pytest.mark.parametrize("far", CACHE_STRIDES)
def test_gathered_pages_beyond_2_to_the_31_elements(far):
    near, distant = gathered(far, forward_cases.device().ptx(GATHERED))
    for got, want in zip(distant, near, strict=True):
        assert torch.equal(got, want) and not got.isnan().any()


KEYS = "forward/gathered_keys.cuh"
MUTATIONS = {
    "32 bits": (KEYS, "int64_t const bytes =", "int const bytes ="),
    "another head": (KEYS, " head * ref.head_stride", " 0 * ref.head_stride"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_offsets_of_32_bits_are_noticed(name, tmp_path):
    root = changed_sources(tmp_path, MUTATIONS[name])
    unit = Unit(root / "forward" / "kernel.cu", GATHERED.defines, "changed")
    image = compile_unit(unit).ptx.read_bytes() + b"\0"
    try:
        _, distant = gathered("head", image)
    except _native.DriverError:  # it has read where there is nothing
        return
    near, _ = gathered("head", forward_cases.device().ptx(GATHERED))
    assert not all(torch.equal(x, y) for x, y in zip(near, distant, strict=True))
