"""Calls of the FP8 forward kernel on the simulated device, with descales that differ everywhere."""

import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import Unit, compile_unit, kernel_root
from forward_cases import device, draw, int32, launch, masks, packed, real, sequences
from forward_launch import Call, ForwardKernel
from fp8_model import quantise


def descales(variant, batch, heads, heads_kv, blocks_q, blocks_k, *, packed=False, seed=7):
    """Descales around 1/32, different for every head, or for every block of a head."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads: int, blocks: int) -> torch.Tensor:
        shape = (batch, heads) if variant.scales == "head" else (batch, heads, blocks)
        shape = (1, *shape[1:]) if packed and variant.scales == "block" else shape
        return torch.empty(shape).uniform_(0.5, 1.1, generator=generator) / 32

    # FA3's q_descale has KV heads; ours may also have query heads.
    heads_q = heads if variant.scales == "block" or heads_kv == 1 else heads_kv
    return {
        "q_descale": tensor(heads_q, blocks_q),
        "k_descale": tensor(heads_kv, blocks_k),
        "v_descale": tensor(heads_kv, blocks_k),
    }


def cache_descales(batch, heads_kv=1):
    """Those of an e4m3 cache under a 16-bit q."""
    values = torch.linspace(0.5, 1.1, 2 * batch * heads_kv).view(2, batch, heads_kv) / 32
    return dict(zip(("k_descale", "v_descale"), values, strict=True))


def dense_call(variant, batch, seqlen_q, seqlen_k, heads, heads_kv, **given) -> Call:
    q, k, v = draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch)
    blocks = (-(-seqlen_q // 128), max(1, -(-seqlen_k // 128)))
    given = {"descales": descales(variant, batch, heads, heads_kv, *blocks), **given}
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), **given)


def from_tensors(q, k, v, **given) -> Call:
    """A call on wide tensors (batch, seqlen, heads, d), quantised per head."""
    (q8, qd), (k8, kd), (v8, vd) = quantise(q, q.shape[2] // k.shape[2]), quantise(k), quantise(v)
    scales = {"q_descale": qd, "k_descale": kd, "v_descale": vd}
    return Call(q8, k8, v8, q.shape[-1] ** -0.5, descales=scales, **given)


def wide(seqlen_q, seqlen_k, *, mean_v=0.0, seed=0, d=128):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 1, d, generator=g) for n in (seqlen_q, seqlen_k, seqlen_k))
    return q, k, v + mean_v


def packed_call(variant, **given) -> Call:
    """Five sequences, two of them empty, of which not all rows are used."""
    offsets = packed([5, 0, 130, 1, 64])
    total = int(offsets[-1])
    q, k, v = draw(variant, total, total, 2, 1)
    blocks = total // 128 + 5
    scales = descales(variant, 5, 2, 1, blocks, blocks, packed=True)
    indices = {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "seqused_q": int32([5, 0, 99, 0, 64]),
        "seqused_k": int32([3, 0, 77, 1, 0]),
    }
    given = {"max_seqlen_q": 130, "max_seqlen_k": 130, "descales": scales, **given}
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), indices=indices, **given)


def check_one_visible_key(variant, out_dtype) -> None:
    """O is then V, rounded once."""
    call = dense_call(variant, 1, 200, 200, 2, 1, out_dtype=out_dtype)
    o, _ = launch(variant, replace(call, window=(0, 0)))
    (want,) = (real(call, "v", used, torch.float32).to(out_dtype) for used in sequences(call))
    assert torch.equal(o, want.expand_as(o))


def check_visible_nan(variant) -> None:
    """A NaN in V reaches the rows of a causal variant that see it, and stays in its channel. Rows
    of its tile that do not see it may have it too: 0 * NaN."""
    call = dense_call(variant, 1, 40, 40, 1, 1)
    call.v[0, 20, 0, 5] = math.nan
    o, _ = launch(variant, call)
    assert o[0, 20:, 0, 5].isnan().all()
    assert not o[..., :5].isnan().any() and not o[..., 6:].isnan().any()


def changed_sources(folder: Path, *edits: tuple[str, str, str]) -> Path:
    """A copy of hopper/ with (file, old, new) edits."""
    root = folder / "hopper"
    shutil.copytree(kernel_root(), root)
    for name, old, new in edits:
        path = root / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        path.write_text(text.replace(old, new))
    # A header that changed within the step of the clock may have changed while it was read, so the
    # cache has such a kernel compiled twice.
    time.sleep(0.02)
    return root


def changed_kernel(
    folder: Path, variant: ForwardVariant, *edits: tuple[str, str, str]
) -> ForwardKernel:
    """A variant compiled from sources with (file, old, new) edits."""
    root = changed_sources(folder, *edits)
    unit = Unit(root / "forward" / "kernel.cu", variant.defines, "changed")
    return ForwardKernel(device().driver, compile_unit(unit).ptx.read_bytes() + b"\0")


def changed_ptx(variant: ForwardVariant, pattern: bytes, new: bytes) -> bytes:
    """A variant's PTX with every match of `pattern` replaced: nothing is compiled for it."""
    changed, count = re.subn(pattern, new, device().ptx(variant))
    assert count, f"the PTX of {variant.name} has no {pattern!r}"
    return changed
