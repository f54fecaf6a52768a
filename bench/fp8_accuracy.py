"""How accurate FP8 attention is, and what each choice of its numerics is worth.

    python bench/fp8_accuracy.py            measures everything, a few minutes on two cores
    python bench/fp8_accuracy.py --quick    smaller problems, under a minute, nothing is written

Runs on the CPU backend, which computes what the kernels compute; `hopper` rows emulate the FP8
tensor cores bit by bit. Writes bench/results/fp8_accuracy.json, plots under docs/images, and the
tables of docs/fp8.md, whose numbers all come from here. Errors are relL2 = |x - ref| / |ref|
against float64 unless a table says otherwise.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import environment
import flash8
from flash8 import fp8
from flash8.tensors.float8 import saturating_cast
from flash8.tensors.rotary import apply_rotary

RESULTS = Path(__file__).parent / "results" / "fp8_accuracy.json"
Rows = list[dict[str, Any]]


# ------------------------------------------------------------------------------------ float64


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention in float64, head by head: q, k, v (1, seqlen, heads, d)."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float64)
    for h in range(q.shape[2]):
        s = q[0, :, h].double() @ k[0, :, h].double().T * q.shape[-1] ** -0.5
        out[0, :, h] = (masked(s) if causal else s).softmax(-1) @ v[0, :, h].double()
    return out


def masked(s: Tensor) -> Tensor:
    hidden = torch.ones_like(s, dtype=torch.bool).triu(1 + s.shape[1] - s.shape[0])
    return s.masked_fill(hidden, float("-inf"))


def exact_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    xs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    s = torch.einsum("bihd,bjhd->bhij", xs[0], xs[1]) * q.shape[-1] ** -0.5
    torch.einsum("bhij,bjhd->bihd", s.softmax(-1), xs[2]).backward(dout.double())
    return [x.grad for x in xs]


def rel_l2(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def attend(q: Any, k: Any, v: Any, **options: Any) -> Tensor:
    """flash8's O in fp16, whose rounding is small against what is measured."""
    data = q.data if isinstance(q, fp8.ScaledTensor) else q
    out = torch.empty((*data.shape[:-1], v.shape[-1]), dtype=torch.float16)
    return flash8.flash_attn_func(q, k, v, out=out, **options)


# ----------------------------------------------------------------------------------- studies


def rmse_table(quick: bool) -> Iterator[dict[str, Any]]:
    """FA3's test (arXiv 2407.08608, table 3): N(0, 1) + N(0, 100) * Bernoulli(0.001)."""
    seqlen, d, heads = (1024, 128, 2) if quick else (4096, 128, 16)
    shape, rows = (1, seqlen, heads, d), slice(0, seqlen // 4)
    q, k, v = (
        torch.randn(shape) + 10 * torch.randn(shape) * (torch.rand(shape) < 0.001) for _ in range(3)
    )
    reference = exact(q[:, rows], k, v)
    half = [x.half() for x in (q[:, rows], k, v)]

    def scaled(granularity: str, hadamard: bool) -> list[fp8.ScaledTensor]:
        rotated = [fp8.quantize(x, granularity, hadamard=hadamard) for x in (q[:, rows], k)]
        return [*rotated, fp8.quantize(v, granularity)]

    methods: dict[str, tuple[Callable[[], Tensor], float, float | None]] = {
        "FP16, two passes": (lambda: two_passes(*half), 2.5e-4, 3.2e-4),
        "FP16, flash": (lambda: attend(*half), 1.6e-4, 1.9e-4),
        "FP8, two passes, P not scaled": (lambda: two_passes_fp8(q[:, rows], k, v), 2.7e-2, 2.4e-2),
        "FP8, block scales": (lambda: attend(*scaled("block", False)), 1.7e-2, 2.4e-2),
        "FP8, Hadamard": (lambda: attend(*scaled("head", True)), 8.5e-3, 9.3e-3),
        "FP8, block scales and Hadamard": (lambda: attend(*scaled("block", True)), 8.6e-3, 9.1e-3),
    }
    for method, (compute, emulated, paper) in methods.items():
        rmse = (compute().double() - reference).square().mean().sqrt().item()
        yield dict(method=method, rmse=rmse, emulated=emulated, paper=paper)


def two_passes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Textbook attention in fp16: S and P are stored in it."""
    s = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()).half()
    p = (s.float() * q.shape[-1] ** -0.5).half().float().softmax(-1).half()
    return torch.einsum("bhij,bjhd->bihd", p.float(), v.float()).half()


def two_passes_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with e4m3 operands, one scale per head, and P as it is."""
    q, k, v = (fp8.dequantize(fp8.quantize(x, "head")) for x in (q, k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", saturating_cast(s.softmax(-1)).float(), v)


def context_length(quick: bool) -> Iterator[dict[str, Any]]:
    """std-1 logits, V of mean 0.5, 16 queries: the accumulator against the number of keys."""
    for keys in (1024, 4096) if quick else (1024, 4096, 16384, 131072):
        q, k = torch.randn(1, 16, 1, 128), torch.randn(1, keys, 1, 128)
        tensors = [fp8.quantize(x, "head") for x in (q, k, torch.randn(1, keys, 1, 16) + 0.5)]
        reference = exact(*map(fp8.dequantize, tensors))
        for promotion in (False, 2048, 512, 128):
            with fp8.study(accumulation="hopper", promotion=promotion):
                error = rel_l2(attend(*tensors), reference)
            yield dict(keys=keys, promotion=promotion or "never", error=error)
        yield dict(keys=keys, promotion="fp32 sums", error=rel_l2(attend(*tensors), reference))


def smoothing(quick: bool) -> Iterator[dict[str, Any]]:
    """Causal, d = 128: K's channels biased, before rotary embedding or without it."""
    seqlen = 512 if quick else 2048
    frequencies = 10000.0 ** (-torch.arange(64) / 64)
    angles = torch.arange(seqlen)[:, None] * frequencies
    for data in ("no bias", "6 channels of bias 20, rotary", "2 channels of bias 60 and 40"):
        q, k, v = (torch.randn(1, seqlen, 2, 128) for _ in range(3))
        if data.startswith("6"):
            k[..., -6:] += 20.0  # channels that turn slowly keep their bias
            q, k = (
                apply_rotary(x, angles.cos(), angles.sin(), torch.arange(seqlen), interleaved=True)
                for x in (q, k)
            )
        if data.startswith("2"):
            k[..., 5], k[..., 77] = k[..., 5] + 60.0, k[..., 77] + 40.0
        reference = exact(q, k, v, causal=True)
        for hadamard in (False, True):
            for smooth_k in (False, True):
                out = attend(
                    fp8.quantize(q, "head", hadamard=hadamard),
                    fp8.quantize(k, "head", hadamard=hadamard, smooth_k=smooth_k),
                    fp8.quantize(v, "head"),
                    causal=True,
                )
                names = ("Hadamard",) * hadamard + ("smooth K",) * smooth_k
                method = " and ".join(names) or "none"
                yield dict(data=data, method=method, error=rel_l2(out, reference))


def p_reference(quick: bool) -> Iterator[dict[str, Any]]:
    """Only P is rounded (exact e4m3 q, k, v): what the reference of its exponent is worth."""
    seqlen = 512 if quick else 2048
    positions = {"first": 0, "middle": seqlen // 2, "last": seqlen - 1}
    for data in ("std-3 logits", *(f"sink key {name}" for name in positions)):
        q, k = torch.randn(1, 64, 1, 128), torch.randn(1, seqlen, 1, 128)
        v = torch.randn(1, seqlen, 1, 64)
        if data == "std-3 logits":
            q = 3.0 * q
        else:
            # One logit 13 above the rest, on a key without a value; the others' values have a mean.
            position = positions[data.split()[-1]]
            q[..., 0], k[..., 0], v = 8.0, 0.0, v + 0.5
            k[:, position, :, 0], v[:, position] = 13.0 * 128**0.5 / 8.0, 0.0
        tensors = [fp8.quantize(x, "head") for x in (q, k, v)]
        reference = exact(*map(fp8.dequantize, tensors))
        for p_scaling in ("none", "running_max", "block_local"):
            with fp8.study(p_scaling=p_scaling):
                error = rel_l2(attend(*tensors), reference)
            yield dict(data=data, p_scaling=p_scaling, error=error)


def gradients(quick: bool) -> Iterator[dict[str, Any]]:
    """std-1 logits, d = 128, bf16: gradients of FP8 attention against those of the inputs."""
    q, k, v, dout = gradient_problem(quick)
    reference = exact_gradients(q, k, v, dout)
    e5m2 = torch.float8_e5m2
    recipes = {
        "16bit": fp8.CurrentScaling(),
        "16bit, block scales": fp8.BlockScaling(),
        "16bit, Hadamard and smooth K": fp8.CurrentScaling(hadamard=True, smooth_k=True),
        "fp8_scores": fp8.CurrentScaling(backward="fp8_scores"),
        "fp8_scores_dv": fp8.CurrentScaling(backward="fp8_scores_dv"),
        "fp8": fp8.CurrentScaling(backward="fp8"),
        "fp8, e5m2 gradients": fp8.CurrentScaling(backward="fp8", gradient_dtype=e5m2),
        "fp8_scores_dv, P not scaled": fp8.CurrentScaling(backward="fp8_scores_dv"),
    }
    for name, recipe in recipes.items():
        xs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fp8.fp8_attention(*xs, recipe)
        with fp8.study(p_scaling="none" if "not scaled" in name else "block_local"):
            out.backward(dout)
        yield dict(backward=name, **errors([x.grad for x in xs], reference))


def backward_operands(quick: bool) -> Iterator[dict[str, Any]]:
    """The dequantized operands against the original ones, which flash8 refuses."""
    for std in (1, 4):
        q, k, v, dout = gradient_problem(quick)
        q = q * std
        named = zip("qkv", (q, k, v), strict=True)
        recipe = fp8.CurrentScaling()
        seen = [fp8.dequantize(recipe.quantize(name, x, None)) for name, x in named]
        references = dict(seen=exact_gradients(*seen, dout), true=exact_gradients(q, k, v, dout))
        out, lse = fp8.fp8_attention(q, k, v, recipe, return_attn_probs=True)
        for name, operands in (("dequantized", seen), ("original", (q, k, v))):
            operands = [x.bfloat16() for x in operands]
            options = flash8.call.options.Options()
            got = torch.ops.flash8.backward(dout, None, *operands, None, None, out, lse, *options)
            s = torch.einsum("bihd,bjhd->bhij", operands[0].double(), operands[1].double())
            rows = (s * 128**-0.5 - lse.double()[..., None]).exp().sum(-1)
            yield dict(
                std=std,
                operands=name,
                least_row_sum=rows.min().item(),
                largest_row_sum=rows.max().item(),
                **{f"dq_{which}": rel_l2(got[0], ref[0]) for which, ref in references.items()},
            )


def gradient_problem(quick: bool) -> list[Tensor]:
    seqlen = 256 if quick else 1024
    return [torch.randn(1, seqlen, 2, 128).bfloat16() for _ in range(4)]


def errors(got: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    named = zip(("dq", "dk", "dv"), got, reference, strict=True)
    return {name: rel_l2(x, y) for name, x, y in named}


def key_bias(quick: bool) -> Iterator[dict[str, Any]]:
    """A channel of K with a bias of 10: dQ against the dequantized inputs."""
    q, k, v, dout = gradient_problem(quick)
    k[..., 3] += 10.0
    recipe = fp8.CurrentScaling()
    named = zip("qkv", (q, k, v), strict=True)
    seen = [fp8.dequantize(recipe.quantize(name, x, None)) for name, x in named]
    reference = exact_gradients(*seen, dout)
    out, lse = fp8.fp8_attention(q, k, v, recipe, return_attn_probs=True)
    operands = [x.bfloat16() for x in seen]
    options = flash8.call.options.Options()
    got = torch.ops.flash8.backward(dout, None, *operands, None, None, out, lse, *options)
    yield dict(product="dS K", dq=rel_l2(got[0], reference[0]))
    xs = [x.clone().requires_grad_() for x in (q, k, v)]
    fp8.fp8_attention(*xs, recipe).backward(dout)
    yield dict(product="dS (K - mean of K)", dq=rel_l2(xs[0].grad, reference[0]))


def cache(quick: bool) -> Iterator[dict[str, Any]]:
    """16-bit queries over an e4m3 cache, d = 128, against the dequantized cache and in all."""
    seqlen = 512 if quick else 4096
    q = torch.randn(1, 16, 4, 128).bfloat16()
    k, v = (torch.randn(1, seqlen, 4, 128).bfloat16() for _ in range(2))
    truth = exact(q, k, v)
    for granularity in ("tensor", "head", "block"):
        k8, v8 = fp8.quantize(k, granularity), fp8.quantize(v, granularity)
        out = flash8.flash_attn_func(q, k8, v8)
        seen = exact(q, fp8.dequantize(k8), fp8.dequantize(v8))
        yield dict(granularity=granularity, dequantized=rel_l2(out, seen), total=rel_l2(out, truth))


STUDIES: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "rmse_table": rmse_table,
    "context_length": context_length,
    "smoothing": smoothing,
    "p_reference": p_reference,
    "gradients": gradients,
    "backward_operands": backward_operands,
    "key_bias": key_bias,
    "cache": cache,
}


def measure(quick: bool, names: list[str]) -> dict[str, Rows]:
    """Every study from the same seed, so that one alone gives what it gives among all."""
    results: dict[str, Rows] = {}
    with tqdm(total=len(names), desc="FP8 accuracy") as bar:
        for name in names:
            bar.set_postfix_str(name)
            torch.manual_seed(0)
            results[name] = []
            for row in STUDIES[name](quick):
                results[name].append(row)
                bar.set_postfix_str(f"{name} {len(results[name])}")
            bar.update()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller problems, nothing is written")
    parser.add_argument("--only", choices=STUDIES, nargs="*", help="studies to run; prints them")
    parser.add_argument("--report", action="store_true", help="plots and tables of the stored JSON")
    arguments = parser.parse_args()
    if not arguments.report:
        results = measure(arguments.quick, arguments.only or list(STUDIES))
        if arguments.quick or arguments.only:
            for name, rows in results.items():
                print(name, *rows, sep="\n  ")
            return
        text = json.dumps(dict(environment=environment.describe(), **results), indent=1)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")
    from fp8_report import write_report  # matplotlib, only where it is needed

    write_report(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
