"""Sound kernels of the QKV projection pass their check, and serve; wrong ones fail it."""

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper import kernels
from flash8.backends.hopper import qkv_projection as hopper
from flash8.backends.hopper.qkv_variants import SHIPPED_QKV_PROJECTIONS, QkvVariant
from flash8.backends.hopper.verify import qkv_projection as check
from flash8.backends.hopper.verify import trust
from flash8.ops import qkv_projection as ops
from gemm_cases import changed_text
from gemm_cases import device as gemm_device
from qkv_cases import assert_same, emulated, make
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
BLOCK = QkvVariant("block")


def test_variants():
    assert [x.name for x in SHIPPED_QKV_PROJECTIONS] == [
        "qkv_projection_outer",
        "qkv_projection_block",
    ]
    assert set(SHIPPED_QKV_PROJECTIONS) <= set(kernels.shipped())
    with pytest.raises(ValueError, match="scales is 'page'; supported are"):
        QkvVariant("page")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": (0, 5)}, "there is no token"),
        ({"tokens": (5,), "cu_seqlens": [0]}, "there is no token"),
        ({"head_dim": 64, "rope": "halves", "rotary_dim": 64}, "head_dim is 64"),
        ({"rope": "halves", "rotary_dim": 64}, "rotary_dim is 64"),
        ({"rope": "interleaved", "rotary_dim": 64}, None),
        ({}, None),
    ],
)
def test_what_the_kernel_refuses(options, words):
    projection = make(**{"tokens": (1, 5), "k": 32, **options})
    reason = hopper.refusal(projection)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize("variant", by_default(SHIPPED_QKV_PROJECTIONS, SHIPPED_QKV_PROJECTIONS))
def test_a_sound_kernel_passes(variant, checked):
    with checked():
        assert trust.find_fault(variant, CPU) is None


def test_what_a_gpu_is_given_walks_many_tiles(monkeypatch):
    """With 5 multiprocessors, as `gemm_cases` has them."""
    projection = check.Draw(BLOCK, CPU).of_more_blocks(5)
    assert projection.descale_shapes()[0] == (2, 4, 1)
    with gemm_device().serving_cpu_tensors(monkeypatch):
        assert check.find_fault_of(BLOCK, projection) is None


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_a_sound_kernel_serves(granularity, checked):
    projection = make((140,), 144, (2, 1), granularity, rope="halves", cu_seqlens=[0, 3, 140])
    want = emulated(projection)
    with checked():
        found, said = told(lambda: ops.qkv_projection(projection))
        assert device().report()["kernel"] == "flash8_qkv_projection"
    assert not said
    assert_same(found, want)


def test_kernels_of_the_parts_serve_what_it_refuses(checked):
    """With pairs that lie apart in the first 64 channels."""
    projection = make((1, 70), 144, rope="halves", rotary_dim=64)
    want = emulated(projection)
    with checked():
        found, said = told(lambda: ops.qkv_projection(projection))
        assert device().report()["kernel"] == "flash8_quantize_cast"
    assert not said
    assert_same(found, want)


#: Edits of the PTX, of the kernel that must not pass, and what its check says.
WRONG = {
    "turned the other way": (r"sub\.rn\.f32", "add.rn.f32", "of q differ"),
    "no norm": (r"sqrt\.rn\.f32\s+(%f\d+), %f\d+;", r"mov.f32 \1, 0f3F800000;", "of q differ"),
    "keys in another order": (r", 20800;", ", 21520;", "of v"),  # __byte_perm's
    "a trap": (r"\bret;", "trap; ret;", "LAUNCH_FAILED"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails_and_the_parts_serve(name, checked):
    pattern, new, words = WRONG[name]
    text = changed_text(BLOCK, pattern, new)
    projection = make((1, 70), 144)
    want = ops.qkv_projection(projection)
    with checked(lambda variant: text if variant == BLOCK else device().ptx(variant)):
        have, said = told(lambda: ops.qkv_projection(projection))
        _, again = told(lambda: ops.qkv_projection(projection))
    assert len(said) == 1 and not again
    assert f"its kernel {BLOCK.name} on cpu: " in said[0] and words in said[0]
    for x, y in zip(have[1::2], want[1::2], strict=True):
        assert torch.allclose(x, y, rtol=1e-2)
