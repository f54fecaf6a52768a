"""Decode kernels that append on the simulated device: O and LSE against float64 attention over what
the caches hold afterwards, and every bit of the caches against the portable append.

What is in the caches before is NaN wherever no query sees an old key, the places of new ones too.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from decode_cases import compare, launch, poisoned
from decode_launch import Call, DecodeKernel
from faults import Fault
from flash8 import _native
from flash8.backends.cpu import append as portable
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.call.request import Appended, Queries
from flash8.compiler import Unit, compile_unit
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope
from forward_cases import device, int32, packed
from forward_launch import Launch, Uploaded
from fp8_forward_cases import changed_sources

_WORDS = {1: torch.uint8, 2: torch.int16}


@dataclass(frozen=True)
class Step(Call):
    """A call with new rows: q is neither normalised nor rotated yet, seqused_k is without them."""

    new_k: Tensor = field(default_factory=lambda: torch.empty(0))  # (batch, n, heads, d), or packed
    new_v: Tensor = field(default_factory=lambda: torch.empty(0))
    cu_seqlens_new: Tensor | None = None
    rope: Rope | None = None
    norms: tuple[Norm | None, Norm | None] = (None, None)  # of q and k

    def appended(self) -> tuple[Appended, Appended]:
        where = (self.indices["seqused_k"], self.cu_seqlens_new, self.page_table)
        where += (self.indices.get("kv_batch_idx"),)  # type: ignore[assignment]
        return (
            Appended(
                *(self.k, self.new_k, *where, self.k_descale, self.k_mean, self.rope),
                norm=self.norms[1],
            ),
            Appended(self.v, self.new_v, *where, self.v_descale, self.v_mean),
        )

    def queries(self) -> Queries:
        advances = self.causal or self.window != (-1, -1) or self.attention_chunk > 0
        cu_seqlens = self.indices.get("cu_seqlens_q")
        return Queries(self.q, self.rope, cu_seqlens, advances, self.norms[0])

    def done(self) -> Call:
        """The call over what this one leaves in the caches, by the portable append."""
        k, v = (x._replace(cache=x.cache.clone()) for x in self.appended())
        rotated, lengths = portable.append(k, v, queries=self.queries())
        assert rotated is not None
        indices = {**self.indices, "seqused_k": lengths.int()}
        given = {name: getattr(self, name) for name in Call.__dataclass_fields__}
        return Call(**{**given, "q": rotated, "k": k.cache, "v": v.cache, "indices": indices})


class AppendingKernel(DecodeKernel):
    """A compiled variant that appends. `caches` are those of the last launch."""

    def step(self, step: Step, ctas: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """O, LSE and the caches."""
        ((o, lse),) = self(step, ctas=ctas)
        k, v = (memory.read(x) for memory, x in self._caches)
        return o, lse, k, v

    def _describe(self, given: Launch, call: Call) -> tuple:
        assert isinstance(call, Step)
        params, *outputs = super()._describe(given, call)
        self._caches = [(_found(given, getattr(params, x)[0]), getattr(call, x)) for x in "kv"]
        self._describe_new(given, params.append, call)
        return params, *outputs

    def _describe_new(self, given: Launch, append: _native.AppendParams, call: Step) -> None:
        for rows, x in ((append.k, call.new_k), (append.v, call.new_v)):
            given.tensor(rows, "x", x)
            rows.tokens = x.shape[:-2].numel()
            if call.cu_seqlens_new is None:
                rows.seqlen = x.shape[1]
        if call.cu_seqlens_new is not None:
            address = given.upload(call.cu_seqlens_new).address
            append.k.cu_seqlens = append.v.cu_seqlens = address
        queries = call.queries()
        append.q.advances, append.k.advances = int(queries.advances), 1
        for rows, norm in zip((append.q, append.k), call.norms, strict=True):
            rows.rotates = int(call.rope is not None)
            if norm is not None:
                rows.norm_weight, rows.norm_eps = given.upload(norm.weight).address, norm.eps
                rows.norm_is_fp32 = int(norm.weight.dtype == torch.float32)
        if call.rope is not None:
            rotary, (cos, sin, offsets, interleaved) = append.rotary, call.rope
            rotary.cos, rotary.sin = (given.upload(x).address for x in (cos, sin))
            rotary.cos_stride = rotary.sin_stride = cos.shape[1]
            rotary.positions, rotary.rotary_dim = cos.shape[0], 2 * cos.shape[1]
            rotary.is_fp32, rotary.interleaved = int(cos.dtype == torch.float32), int(interleaved)
            assert offsets is not None
            rotary.offsets = given.upload(offsets).address


def _found(given: Launch, address: int) -> Uploaded:
    return next(x for x in given._memory if x.address == address)


@functools.cache
def kernel(variant: DecodeVariant) -> AppendingKernel:
    return AppendingKernel(device().driver, device().ptx(variant))


def changed_kernel(folder: Path, fault: Fault) -> AppendingKernel:
    root = changed_sources(folder, *fault.edits)
    unit = Unit(root / "decode" / "kernel.cu", fault.variant.defines, "changed")
    return AppendingKernel(device().driver, compile_unit(unit).ptx.read_bytes() + b"\0")


def with_new_keys(
    call: Call,
    new: int | Sequence[int],
    *,
    rotary_dim: int = 0,
    interleaved: bool = True,
    normalises: bool = False,
    table_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """A step that appends so many rows to each sequence, packed where there are several numbers."""
    generator = torch.Generator().manual_seed(seed + 100)
    shape = (call.batch, new) if isinstance(new, int) else (sum(new),)

    def rows(cache: Tensor) -> Tensor:
        return torch.randn(*shape, *cache.shape[2:], generator=generator).to(dtype)

    dtype = call.q.dtype
    given = {name: getattr(call, name) for name in Call.__dataclass_fields__}
    if rotary_dim:
        angles = 3.0 * torch.randn(9000, rotary_dim // 2, generator=generator)
        starts = call.indices["seqused_k"]
        tables = (angles.cos().to(table_dtype), angles.sin().to(table_dtype))
        given["rope"] = Rope(*tables, starts.clamp(0, 8000), interleaved)
    if normalises:
        weights = (1.0 + 0.2 * torch.randn(2, call.q.shape[-1], generator=generator)).unbind()
        given["norms"] = (Norm(weights[0].to(dtype), 1e-3), Norm(weights[1], 1e-3))
    cu_seqlens = None if isinstance(new, int) else packed(new)
    return Step(**given, new_k=rows(call.k), new_v=rows(call.v), cu_seqlens_new=cu_seqlens)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_WORDS[x.element_size()])


def _nan(x: Tensor) -> Tensor:
    return torch.full(x.shape, math.nan).to(x.dtype)


def prepared(step: Step) -> tuple[Step, Call]:
    """The step over caches of NaN but for the old keys that some query sees, and the call over what
    it leaves there, with the new rows that none sees."""
    hidden = poisoned(step.done())
    before = {}
    for name, new in zip("kv", _written(step), strict=True):
        cache = getattr(hidden, name)
        before[name] = torch.where(new, _nan(cache).float(), cache.float()).to(cache.dtype)
    step = replace(step, **before)
    return step, step.done()


def _written(step: Step) -> tuple[Tensor, Tensor]:
    """bool, as the caches: the places of new rows."""
    done = replace(step, k=_nan(step.k), v=_nan(step.v)).done()
    return ~done.k.float().isnan(), ~done.v.float().isnan()


def run(
    variant: DecodeVariant, step: Step, ctas: int, seed: int, changed: AppendingKernel | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device().configure(seed=seed)
    try:
        return (changed or kernel(variant)).step(step, ctas)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error


def check(
    variant: DecodeVariant,
    step: Step,
    *,
    ctas: int = 3,
    seeds: Sequence[int] = (0, 1),
    two_launches: bool = False,
    changed: AppendingKernel | None = None,
) -> None:
    """Caches bit by bit, O and LSE against float64, and with two_launches the bits of the kernel
    that finds the new rows in the caches."""
    # What no query sees may be infinite, and then counts for nothing.
    sound = replace(step, new_v=step.new_v.nan_to_num(posinf=0.0)).done()
    step, after = prepared(step)
    for seed in seeds:
        o, lse, k, v = run(variant, step, ctas, seed, changed)
        for name, found, want in (("K", k, after.k), ("V", v, after.v)):
            wrong = int((bits(found) != bits(want)).sum())
            assert wrong == 0, f"seed {seed}: {wrong} elements of the {name} cache differ"
        compare(sound, o, lse)
    if two_launches:
        ((o2, lse2),) = launch(replace(variant, append=False), after, ctas=ctas)
        assert torch.equal(o, o2) and torch.equal(lse, lse2)


def found_by(
    fault: Fault, problems: Sequence[tuple[Step, int]], seeds: Sequence[int], folder: Path
) -> str | None:
    """Under which seed, and by which of these steps and CTAs, a planted fault shows."""
    changed = changed_kernel(folder, fault)
    for seed in seeds:
        for i, (step, ctas) in enumerate(problems):
            try:
                check(fault.variant, step, ctas=ctas, seeds=(seed,), changed=changed)
            except (AssertionError, RuntimeError) as error:
                return f"seed {seed}, problem {i}: {str(error)[:200]}"
    return None


def lengths(step: Step, *values: int) -> Step:
    """The same with other lengths before the append."""
    return replace(step, indices={**step.indices, "seqused_k": int32(values)})
