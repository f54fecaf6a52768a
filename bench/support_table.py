"""The support table of README.md, made by asking the code.

Every row is a list of calls. Each runs on CPU tensors, and once more with the same tensors routed
as those of a Hopper GPU: either a kernel is asked for, or the portable code serves right away.
Calls of one row that end differently are an error. No GPU is needed, and no kernel runs.

    python bench/support_table.py           # prints the table
    python bench/support_table.py --write   # rewrites it in README.md
"""

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash8 import backends, fp8
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.qkv_variants import QkvVariant
from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust
from flash8.ops import plan_cache, planned
from support_calls import (
    BF16,
    E4M3,
    FP16,
    FP32,
    FP64,
    Call,
    appended,
    cached,
    dense,
    ints,
    latent,
    multiplied,
    multiplied_along_k,
    multiplied_in_groups,
    norms,
    operand,
    operand_of_attention,
    operand_of_norm,
    operand_of_silu,
    packed,
    per_head,
    prefilled,
    projected,
    quantize,
    quantized,
    rotary,
    tables,
    tensors,
    trained,
    trained_fp8,
)

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table: support (bench/support_table.py --write) -->\n", "<!-- end -->"


class Row(NamedTuple):
    """Calls of one kind, and the kind of variant whose kernels would serve them: of the backward,
    if it is BackwardVariant, of what they return."""

    label: str
    kernel: type
    calls: list[Call]


ROWS = (
    Row(
        "bf16, fp16 forward: dense, packed, `seqused`, GQA, head_dim up to 256 in steps of 8",
        ForwardVariant,
        [
            *(dense(dim=8), dense(FP16, dim=256), packed()),
            packed(seqused_q=ints([5, 5]), seqused_k=ints([7, 7])),
        ],
    ),
    Row(
        "causal, sliding window, chunks, softcap, ALiBi, sinks, dropout, LSE, `out=`",
        ForwardVariant,
        [
            *(dense(causal=True), packed(window_size=(8, 0))),
            *(dense(causal=True, attention_chunk=8), dense(softcap=20.0)),
            *(dense(alibi_slopes=torch.ones(4)), dense(s_aux=torch.ones(4)), dense(dropout_p=0.5)),
            *(dense(return_attn_probs=True), dense(out=torch.empty(1, 32, 4, 64, dtype=BF16))),
        ],
    ),
    Row(
        "KV cache: `cache_seqlens`, `cache_leftpad`, `cache_batch_idx`, pages of any size",
        DecodeVariant,
        [
            *(cached(BF16), cached(FP16, cache_leftpad=ints([2]), cache_batch_idx=ints([0]))),
            *(cached(BF16, page_table=ints([[0]])), cached(BF16, softcap=20.0)),
        ],
    ),
    Row(
        "the same, more rows than decoding has: pages of any size, 16-bit or e4m3 q over e4m3",
        ForwardVariant,
        [
            *(prefilled(BF16), prefilled(FP16, cache_leftpad=ints([2]))),
            *(prefilled(BF16, page_table=ints([[0]])), prefilled(E4M3, page_table=ints([[0]]))),
            prefilled(BF16, page_table=ints([[0]]), cache_leftpad=ints([2])),
            *(prefilled(x, page_table=ints([range(32)]), page_size=1) for x in (BF16, E4M3)),
            *(prefilled(E4M3, q_dtype=x, **per_head()) for x in (BF16, FP16)),
            prefilled(E4M3, page_size=1, q_dtype=BF16, page_table=ints([range(32)])),
        ],
    ),
    Row(
        "an e4m3 cache, 16-bit or e4m3 q: descales by tensor, head, page, token; smoothing; pages",
        DecodeVariant,
        [
            *(cached(E4M3, BF16, **per_head()), cached(E4M3, FP16, **per_head())),
            cached(E4M3, BF16, page_table=ints([[0]]), **per_head()),
            cached(E4M3, BF16, k_mean=torch.zeros(2, 64), **per_head()),
            cached(E4M3, q_descale=torch.ones(1, 4), page_table=ints([[0]]), **per_head()),
            cached(E4M3, BF16, page_table=ints([[0]]), k_descale=torch.ones(1, 2, 1)),
            cached(E4M3, BF16, k_descale=torch.ones(1, 2), v_descale=torch.ones(1, 32, 2)),
        ],
    ),
    Row(
        "KV cache: absorbed MLA (`qv`), 16-bit and e4m3; head_dim up to 512",
        DecodeVariant,
        [
            *(latent(BF16), latent(E4M3, k_descale=torch.ones(1, 1))),
            *(latent(BF16, page_table=ints([[0]])), cached(BF16, dim=512)),
        ],
    ),
    Row(
        "KV cache: trees of drafts (`tree_mask`), splits of fixed boundaries (`split_keys`)",
        DecodeVariant,
        [
            cached(BF16, tree_mask=ints([[1, 3, 5, 9]])),
            cached(E4M3, BF16, split_keys=64, **per_head()),
        ],
    ),
    Row(
        "KV splits; descales by page or token with head_dim above 256 or `qv`",
        DecodeVariant,
        [
            cached(E4M3, BF16, dim=512, k_descale=torch.ones(1, 32, 2)),
            cached(BF16, num_splits=2),
        ],
    ),
    Row(
        "without a cache: `qv`, head_dim above 256; fp32, fp64",
        ForwardVariant,
        [
            *(dense(qv=tensors()[0]), dense(dim=264), dense(FP32), dense(FP64)),
        ],
    ),
    Row(
        "e4m3 forward: descales by tensor, head, 128 tokens, channel of V",
        ForwardVariant,
        [
            *(dense(E4M3), quantized("tensor"), quantized("head"), quantized("block")),
            quantized("head", of_v="channel"),
        ],
    ),
    Row(
        "e4m3 forward: smoothing, rotation, v_colmajor",
        ForwardVariant,
        [quantized("head", smooth=True, hadamard=True), quantized("block", v_colmajor=True)],
    ),
    Row(
        "backward, 16-bit: dense, packed, masks, softcap, ALiBi, sinks, dropout, deterministic",
        BackwardVariant,
        [
            *(trained(), trained(softcap=2.0), trained(window_size=(8, 2)), trained(dim=256)),
            *(trained(dim=72), trained(deterministic=True), trained(alibi_slopes=torch.ones(4))),
            *(
                trained(s_aux=torch.ones(4)),
                packed(leaf=True),
                trained(dropout_p=0.5, dropout_seed=1),
            ),
            trained_fp8(fp8.CurrentScaling()),
        ],
    ),
    Row(
        "backward: head_dim above 256, fp32, fp64; `fp8_attention` with FP8 products",
        BackwardVariant,
        [
            *(trained(dim=264), trained(dtype=FP32)),
            trained_fp8(fp8.CurrentScaling(backward="fp8")),
        ],
    ),
    Row(
        "`fp8.quantize`: rotary, smoothing, rotation, scales, cast, v_colmajor",
        QuantizeVariant,
        [
            *(
                quantize("tensor"),
                quantize("head", smooth_k=True),
                quantize("block", hadamard=True),
            ),
            *(quantize("page", rope=tables()), quantize("block", v_colmajor=True)),
        ],
    ),
    Row(
        "`fp8.quantize` by channel, or with a head_dim that is no multiple of 16",
        QuantizeVariant,
        [quantize("channel"), quantize("head", dim=24)],
    ),
    Row(
        "append to a 16-bit cache: norm and rotary of q and k, pages",
        AppendVariant,
        [
            *(appended(BF16), appended(FP16, **rotary())),
            appended(BF16, page_table=ints([[0]]), **rotary()),
            appended(BF16, **norms(), **rotary()),
        ],
    ),
    Row(
        "append to an e4m3 cache: the same, mean, scale, cast",
        AppendVariant,
        [
            *(appended(E4M3, **per_head()), appended(E4M3, **per_head(), **rotary())),
            appended(E4M3, **per_head(), page_table=ints([[0]]), k_mean=torch.zeros(2, 64)),
            appended(E4M3, **per_head(), **norms()),
        ],
    ),
    Row(
        "`gemm.quantize`, `quantize_rms_norm` and `quantize_silu_mul`: scales by row and 1x128",
        QuantizeMatrixVariant,
        [
            *(operand("row"), operand("1x128")),
            *(operand_of_norm("row"), operand_of_norm("1x128", residual=torch.ones(32, 144))),
            *(operand_of_silu("row"), operand_of_silu("1x128")),
        ],
    ),
    Row(
        "`gemm.quantize_attention`: attention with an e4m3 output, scales by 1x128 or a given one",
        ForwardVariant,
        [
            *(operand_of_attention(x, causal=True) for x in (BF16, FP16, E4M3)),
            operand_of_attention(dim=256, out_scale=torch.ones(1)),
            operand_of_attention(E4M3, page_table=ints([[0]]), seqused_k=ints([32])),
        ],
    ),
    Row(
        "`gemm.scaled_mm`: scales by tensor, row, 1x128 and 128x128 by 128x128; bias; e4m3 output; "
        "split K",
        GemmVariant,
        [
            *(multiplied((1, 1), (1, 1)), multiplied((32, 1), (1, 48), bias=True)),
            *(multiplied((32, 2), (2, 1)), multiplied((1, 2), (2, 1), out_dtype=FP32)),
            multiplied((1, 1), (1, 1), use_fast_accum=True),
            multiplied((32, 2), (2, 1), split_k=2),
            multiplied((1, 1), (1, 1), out_dtype=E4M3, scale_result=torch.ones(1)),
        ],
    ),
    Row(
        "`gemm.grouped_scaled_mm`: groups of rows; scales by tensor, group, row, 1x128 by 128x128",
        GemmVariant,
        [
            multiplied_in_groups((1,), (1,), use_fast_accum=True),
            multiplied_in_groups((2, 1, 1), (2, 48), out_dtype=FP32),
            multiplied_in_groups((32, 2), (2, 2, 1)),
            multiplied_in_groups((2, 16, 2), (2, 2, 1), apart=True),
        ],
    ),
    Row(
        "`gemm.grouped_scaled_mm`: groups along K (gradients of their weights); the same scales",
        GemmVariant,
        [
            multiplied_along_k((1,), (1,), use_fast_accum=True),
            multiplied_along_k((64,), (96,), out_dtype=FP32),
            multiplied_along_k((32, 2), (2, 1)),
        ],
    ),
    Row(
        "`gemm.qkv_projection`: head_dim 128, dense and packed; bias, norms, rotary embedding",
        QkvVariant,
        [
            *(projected(), projected(rotary_interleaved=False, bias=torch.ones(512))),
            projected(rotary_dim=64, q_norm_weight=torch.ones(128), k_norm_weight=torch.ones(128)),
            projected(cu_seqlens=ints([0, 16, 32])),
        ],
    ),
)


def is_served(row: Row) -> bool:
    """Whether kernels would serve the row on a Hopper GPU.

    Raises:
        RuntimeError: they would serve some of its calls.
    """
    served = {_asks_for_kernel(row.kernel, call) for call in row.calls}
    if len(served) > 1:
        raise RuntimeError(f"kernels serve some calls of {row.label!r} and not others")
    return served.pop()


def _asks_for_kernel(kind: type, call: Call) -> bool:
    with as_on_hopper() as asked:
        _run(kind, call)
    return any(isinstance(variant, kind) for variant in asked)


def _run(kind: type, call: Call) -> None:
    result = call()
    if kind is BackwardVariant:
        result.sum().backward()


@contextlib.contextmanager
def as_on_hopper() -> Iterator[list[Any]]:
    """CPU tensors are routed as a Hopper GPU's. The variants that are asked for; none serves.
    Nobody asks the plan caches, which want a driver."""
    asked: list[Any] = []
    before = backends.kernels_wanted, trust.is_trusted, planned.may_launch, plan_cache.may_launch
    planned.may_launch = plan_cache.may_launch = lambda q: False
    backends.kernels_wanted = lambda tensor: True
    trust.is_trusted = lambda variant, device: asked.append(variant) is not None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield asked
    finally:
        backends.kernels_wanted, trust.is_trusted = before[:2]
        planned.may_launch, plan_cache.may_launch = before[2:]


def table() -> str:
    lines = ["| | CPU tensors | CUDA tensors on Hopper |", "|---|---|---|"]
    for row in ROWS:
        for call in row.calls:
            _run(row.kernel, call)
        served = "kernel" if is_served(row) else "tiled PyTorch"
        lines.append(f"| {row.label} | yes | {served} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """README's text with the table between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"README.md has no marker {BEGIN.strip()!r}")
    return f"{head}{BEGIN}{table()}{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table in README.md")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
