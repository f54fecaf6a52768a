"""torch's own FP8 product as an alternative: where it serves, and that it is checked before."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash8
from flash8 import gemm
from flash8.backends import describe, torch_gemm
from flash8.backends.hopper import mode
from flash8.call.scaled_mm import Product
from flash8.ops import gemm as ops

E4M3 = torch.float8_e4m3fn


@pytest.fixture
def chosen(monkeypatch):
    """Sets FLASH8_GEMM; nothing has been checked yet."""

    def choose(value: str) -> None:
        monkeypatch.setenv("FLASH8_GEMM", value)
        torch_gemm.choice.cache_clear()

    monkeypatch.setattr(torch_gemm, "_findings", {})
    yield choose
    monkeypatch.undo()
    torch_gemm.choice.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the products that torch has multiplied."""
    seen: list[tuple[int, int, int]] = []
    multiplied = torch_gemm._multiplied

    def watched(product):
        seen.append(product.sizes)
        return multiplied(product)

    monkeypatch.setattr(torch_gemm, "_multiplied", watched)
    return seen


def given(m=33, n=40, k=144, by="row", seed=3):
    x = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=x).to(E4M3)
    b = torch.randn(n, k, generator=x).to(E4M3).t()
    if by == "one row":
        scales = torch.tensor([0.5]), torch.rand(1, n, generator=x) + 0.5
    elif by == "row":
        scales = torch.rand(m, 1, generator=x) + 0.5, torch.rand(1, n, generator=x) + 0.5
    elif by == "tensor":
        scales = torch.tensor([0.5]), torch.tensor([[0.25]])
    else:
        scales = torch.rand(m, -(-k // 128)) + 0.5, torch.rand(-(-k // 128), -(-n // 128)) + 0.5
    return a, b, *scales


def reference(a, b, scale_a, scale_b):
    return (a.float() * scale_a).double() @ (b.float() * scale_b).double()


@pytest.mark.parametrize("by", ["tensor", "row", "one row"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_it_serves_where_it_is_wanted(by, out_dtype, chosen, calls):
    chosen("torch")
    operands = given(by=by)
    found = gemm.scaled_mm(*operands, out_dtype=out_dtype)
    assert calls[-1] == (33, 40, 144) and len(calls) > 1, "the check comes first"
    want = reference(*operands)
    tolerance = 2.0**-8 if out_dtype == torch.bfloat16 else 1e-5
    assert ((found.double() - want).abs() <= tolerance * want.abs() + 1e-3).all()
    before = len(calls)
    gemm.scaled_mm(*operands, out_dtype=out_dtype)
    assert len(calls) == before + 1, "one check"


def test_into_out_and_with_a_bias(chosen, calls):
    chosen("torch")
    a, b, *scales = given()
    bias = torch.linspace(-3, 3, 40, dtype=torch.bfloat16)
    out = torch.full((33, 80), torch.nan, dtype=torch.bfloat16)[:, :40]
    gemm.scaled_mm(a, b, *scales, bias=bias, out=out)
    want = reference(a, b, *scales) + bias.double()
    assert ((out.double() - want).abs() <= 2.0**-7 * want.abs() + 0.05).all()


@pytest.mark.parametrize("value", ["auto", "flash8"])
def test_cpu_tensors_are_ours_otherwise(value, chosen, calls):
    chosen(value)
    gemm.scaled_mm(*given())
    assert not calls


def test_scales_of_blocks_and_studies_are_ours(chosen, calls):
    chosen("torch")
    gemm.scaled_mm(*given(by="block"))
    with flash8.fp8.study(accumulation="hopper"):
        gemm.scaled_mm(*given())
    assert not calls


@pytest.mark.parametrize("size", ["m", "n", "k"])
def test_nothing_to_multiply_is_ours(size, chosen, calls):
    chosen("torch")
    operands = given(**{size: 0}, by="tensor")
    assert gemm.scaled_mm(*operands).shape == (operands[0].shape[0], operands[1].shape[1])
    assert not calls


def wrong_by_a_row(product):
    found = torch_gemm_multiplied(product)
    found[-1] += found.abs().max()
    return found


def refused(product):
    raise RuntimeError("torch._scaled_mm is only supported on devices of another kind")


torch_gemm_multiplied = torch_gemm._multiplied


@pytest.mark.parametrize("torchs", [wrong_by_a_row, refused])
def test_a_wrong_product_of_torch_does_not_serve(torchs, chosen, monkeypatch):
    chosen("flash8")
    want = gemm.scaled_mm(*given())
    chosen("torch")
    monkeypatch.setattr(torch_gemm, "_multiplied", torchs)
    assert torch.equal(gemm.scaled_mm(*given()), want)
    (finding,) = torch_gemm._findings.values()
    assert "differ" in finding or "another kind" in finding


def on_cuda(monkeypatch, capability, n=48, by="row"):
    """A product of CUDA tensors that hold nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        a = torch.empty(33, 144, dtype=E4M3, device="cuda:0")
        b = torch.empty(n, 144, dtype=E4M3, device="cuda:0").t()
        shapes = {"row": ((33, 1), (1, n)), "tensor": ((1,), (1,)), "block": ((33, 2), (2, 1))}[by]
        scales = [torch.empty(shape, device="cuda:0") for shape in shapes]
        return Product(a, b, *scales, None, torch.bfloat16)


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("no multiple of 16", {"n": 40}),
        ("compute capability 8.6", {"capability": (8, 6)}),
        ("scales are of blocks", {"by": "block"}),
        (None, {}),
        (None, {"by": "tensor", "capability": (12, 0)}),
    ],
)
def test_what_torch_does_not_take_on_cuda(reason, wrong, chosen, monkeypatch):
    found = torch_gemm.refusal(on_cuda(monkeypatch, **{"capability": (8, 9)} | wrong))
    assert found is None if reason is None else reason in found


def test_cuda_tensors_without_a_kernel(chosen, monkeypatch):
    """torch's product is for them by default, and not where it is wrong or FLASH8_GEMM forbids."""
    chosen("auto")
    product = on_cuda(monkeypatch, (8, 9))
    monkeypatch.setattr(torch_gemm, "_fault_of", lambda _: None)
    assert torch_gemm.may_serve(product) and not torch_gemm.comes_first(product)
    monkeypatch.setattr(torch_gemm, "_fault_of", lambda _: "it is wrong")
    assert not torch_gemm.may_serve(product)
    monkeypatch.setattr(torch_gemm, "_fault_of", lambda _: None)
    chosen("flash8")
    assert not torch_gemm.may_serve(product)


def test_what_no_kernel_takes_goes_to_torch(chosen, monkeypatch, calls):
    """As it does on a GPU that is not Hopper's, or beside a kernel that has failed its check."""
    chosen("torch")
    monkeypatch.setattr(torch_gemm, "comes_first", lambda _: False)
    a, b, *scales = given()
    product = Product(a, b, *scales, None, torch.bfloat16)
    assert not ops.is_for_kernels(product)
    gemm.scaled_mm(a, b, *scales)
    assert calls[-1] == (33, 40, 144)


def test_a_wrong_choice(chosen):
    chosen("cublas")
    with pytest.raises(ValueError, match="FLASH8_GEMM is 'cublas'; supported are 'auto'"):
        gemm.scaled_mm(*given())


def test_info_says_so(chosen, monkeypatch):
    chosen("torch")
    rows = [row for row in describe.describe() if row.backend == "torch"]
    assert [row.call for row in rows] == ["CPU tensors, gemm.scaled_mm by tensor or row"]
    chosen("auto")
    assert not [row for row in describe.describe() if row.backend == "torch"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(mode, "why_not", lambda _: "it is not Hopper's")
    rows = [row for row in describe.describe() if row.backend == "torch"]
    assert len(rows) == 1 and "where no kernel serves, checked once" in rows[0].reason
