"""`flash8 sim`: lends the shipped kernels to the command that an installed simulator brings.

That command is the entry point "sim" of the group "flash8.commands": a function of the arguments
and of a `Kernels`. It gives the library of its driver, and looks at what a launch there did.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash8 import _native
from flash8.attention import flash_attn_func
from flash8.backends.hopper import backward, forward
from flash8.backends.hopper.backward_variants import SHIPPED_BACKWARDS, BackwardVariant
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8.call.options import Options
from flash8.tensors import v_colmajor
from flash8.tensors.descales import BLOCK
from flash8.tensors.tokens import Tokens

_Variant = ForwardVariant | BackwardVariant
#: The backward of an FP8 forward reads operands that no call of flash_attn_func has.
_BACKWARDS = tuple(variant for variant in SHIPPED_BACKWARDS if not variant.fp8)
#: Pages change only where the producer's loads come from, and e4m3 outputs only the last stores.
_FORWARDS = tuple(variant for variant in SHIPPED if not variant.paged and variant.out == "wide")
_VARIANTS: tuple[_Variant, ...] = (*_FORWARDS, *_BACKWARDS)
_GROUP = "flash8.commands"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_SOFTCAP = 30.0
_PACKED_RATIO = 4  # query heads of a KV head, where the kernel packs them


def run(arguments: Sequence[str]) -> int:
    """Run `flash8 sim` on its arguments; 1 when no simulator is installed."""
    found = [*metadata.entry_points(group=_GROUP, name="sim")]
    if not found:
        print(
            "flash8 sim: no simulated device is installed; it is the package flash8-sim, in the "
            "folder tests/simulator of flash8's sources: pip install tests/simulator",
            file=sys.stderr,
        )
        return 1
    try:
        command = found[0].load()
    except ImportError as error:
        print(f"flash8 sim: {found[0].value} cannot be loaded: {error}", file=sys.stderr)
        return 1
    status: int = command(arguments, Kernels())
    return status


class Kernels:
    """The shipped kernels of attention, each with a dense call of flash_attn_func that it serves,
    or whose gradients."""

    prog = "flash8 sim"
    names = tuple(variant.name for variant in _VARIANTS)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seqlen-q", type=int, default=256, metavar="N")
        parser.add_argument("--seqlen-k", type=int, default=512, metavar="N")
        parser.add_argument("--heads", type=int, default=1, metavar="N", help="KV heads")

    def describe(self, options: argparse.Namespace) -> str:
        return f"seqlen_q {options.seqlen_q}, seqlen_k {options.seqlen_k}, heads {options.heads}"

    def watched(self, options: argparse.Namespace) -> str:
        """The kernel of a backward has another before it and another behind it."""
        return "flash8_backward" if isinstance(_variant(options), BackwardVariant) else ""

    def run(self, options: argparse.Namespace, driver: Path) -> str:
        """Launches the kernel on the driver in that library, and compares what it gives with the
        CPU backend.

        Raises:
            RuntimeError: no kernel, a launch that fails, or another driver is in use already.
        """
        os.environ["FLASH8_DRIVER"] = str(driver)
        process = _native.Driver.process()
        if process.path != str(driver):
            raise RuntimeError(f"this process has opened the driver {process.path}")
        variant = _variant(options)
        call = draw(variant, options.seqlen_q, options.seqlen_k, options.heads, options.seed)
        if isinstance(variant, BackwardVariant):
            return _run_backward(variant, call, process)
        want = flash_attn_func(**call)
        assert isinstance(want, Tensor)
        q, k, v, described = describe(variant, call)
        batch, rows, heads, _ = q.shape
        out, lse = torch.full_like(want, torch.nan), torch.empty(batch, heads, rows)
        planned = forward.plan(q, k, v, None, described, out, lse, variant)
        forward.launch(planned, 0, None)
        process.synchronize()
        error = (out.double() - want.double()).abs().max()
        return f"|O - O of the CPU backend| is at most {error:.2e}"


def _run_backward(variant: BackwardVariant, call: dict[str, Any], process: _native.Driver) -> str:
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse = flash_attn_func(**call, return_attn_probs=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    want = torch.autograd.grad(out, leaves, dout)
    q, k, v, out, lse = (x.detach() for x in (*leaves, out, lse))
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in want)
    given = backward.Given(dout, None, q, k, v, out, lse)
    planned = backward.plan(given, None, _options(variant, call), dq, dk, dv, variant)
    backward.launch(planned, 0)
    process.synchronize()
    error = max(
        (x.double() - y.double()).abs().max() for x, y in zip((dq, dk, dv), want, strict=True)
    )
    return f"|gradients - those of the CPU backend| is at most {error:.2e}"


def _variant(options: argparse.Namespace) -> _Variant:
    return next(variant for variant in _VARIANTS if variant.name == options.kernel)


def draw(variant: _Variant, seqlen_q: int, seqlen_k: int, heads: int, seed: int) -> dict[str, Any]:
    """Arguments of flash_attn_func that this variant serves, with values that repeat."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(rows: int, heads: int, head_dim: int, dtype: str = variant.dtype) -> Tensor:
        return torch.randn(1, rows, heads, head_dim, generator=generator).to(_DTYPES[dtype])

    packs = isinstance(variant, ForwardVariant) and variant.pack_gqa
    widens = isinstance(variant, ForwardVariant) and variant.cache == "e4m3"
    cached = "e4m3" if widens else variant.dtype
    heads_q = heads * (_PACKED_RATIO if packs else 1)
    call: dict[str, Any] = {
        "q": tensor(seqlen_q, heads_q, variant.head_dim),
        "k": tensor(seqlen_k, heads, variant.head_dim, cached),
        "v": tensor(seqlen_k, heads, variant.head_dim_v, cached),
        "causal": variant.mask == "causal",
        "softcap": _SOFTCAP if variant.softcap else 0.0,
    }
    if variant.mask == "local":
        call["window_size"] = (seqlen_k // 4, 0)
    if isinstance(variant, ForwardVariant) and (widens or variant.scales != "none"):
        for name in "kv" if widens else "qkv":
            shape = [1, heads]
            if variant.scales == "block":
                shape.append(-(-call[name].shape[1] // BLOCK))
            call[f"{name}_descale"] = 0.5 + torch.rand(shape, generator=generator)
    return call


def describe(
    variant: ForwardVariant, call: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """The call as the backend takes it: Q, K, V as the variant reads it, and the options."""
    v, options = call["v"], _options(variant, call)
    if variant.v_colmajor:
        options = options._replace(v_colmajor_tokens=v.shape[1])
        v = v_colmajor.to_colmajor(v, Tokens())
    return call["q"], call["k"], v, options


def _options(variant: _Variant, call: dict[str, Any]) -> Options:
    left, right = call.get("window_size", (-1, 0 if variant.mask == "causal" else -1))
    return Options(
        **{name: x for name, x in call.items() if name.endswith("_descale")},
        causal=call["causal"],
        window_left=left,
        window_right=right,
        softcap=call["softcap"],
    )
