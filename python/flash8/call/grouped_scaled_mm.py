"""One grouped product of e4m3 matrices: rows of A belong to groups, each with a B of its own, or K
belongs to groups, each with an output of its own. Its arguments, checked, and what its scales
mean."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flash8.call.scaled_mm import BLOCK, MOST, UNIT_K, WIDE, blocks_of
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    describe,
    differ,
    is_known,
    require_bool,
    require_rank,
    require_shape,
    require_tensor,
    to_int32,
)
from flash8.tensors.float8 import E4M3
from flash8.tensors.memory import is_shared, require_writable

#: What has a scale of its own: the tensor, a group, a row of A or column of a group's B, or blocks:
#: 128 of K of a row of A, and 128 of K of 128 columns of a group's B. With groups along K every
#: group has scales of all rows of A and columns of B, and blocks are those of all of K.
Granularity = Literal["tensor", "group", "row", "block"]


class GroupedProduct(NamedTuple):
    """A checked call: out = scale_a * scale_b * (rows of a group @ b of the group), or along K
    out[g] = scale_a * scale_b * (a @ b of the group's K).

    a: (M, K), groups one after another, or (G, rows, K), groups apart; row-major. b: (G, K, N),
    each column-major, or along K (K, N). The scales are fp32, and of any strides and granularity.
    group_rows: int32 (G,), with any values: where the rows, or the K, of each group end, or how
    many rows it has.
    """

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    group_rows: Tensor
    out_dtype: torch.dtype
    fast_accum: bool = False

    @property
    def is_apart(self) -> bool:
        """Whether groups lie apart, each with as many rows as any may have."""
        return self.a.dim() == 3

    @property
    def is_along_k(self) -> bool:
        """Whether it is K that belongs to groups."""
        return self.b.dim() == 2

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, rows (of all of them, or of each if they are apart), N and K (of all of them)."""
        return self.group_rows.shape[0], self.a.shape[-2], self.b.shape[-1], self.a.shape[-1]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return out_shape(self.a, self.b, self.group_rows)

    @property
    def has_blocks(self) -> bool:
        """Whether scales change along K, so that they are applied block by block."""
        return self._granularity()[0] == "block"

    def scales(self) -> tuple[Tensor, Tensor]:
        """Views of both: (groups, rows, 1 or blocks of K), where without is_apart every group has
        all rows, and (groups, 1, N) or (groups, blocks of K, blocks of N). One scale for many has
        a stride of zero, as one of many groups has."""
        groups, rows, n, _ = self.sizes
        of_a, of_b = self._granularity()
        scale_a, scale_b = self.scale_a, self.scale_b
        if of_a == "tensor":
            scale_a = scale_a.reshape(1, 1, 1)
        elif of_a == "row" and self.is_along_k:
            scale_a = scale_a if scale_a.dim() == 3 else scale_a.unflatten(0, (groups, rows, 1))
        elif of_a == "row" and scale_a.dim() < self.a.dim():
            scale_a = scale_a.unsqueeze(-1)
        if of_b == "tensor":
            scale_b = scale_b.reshape(1, 1, 1)
        elif of_b == "row" and self.is_along_k:
            scale_b = scale_b if scale_b.dim() == 3 else scale_b.unflatten(0, (groups, 1, n))
        elif of_b == "row" and scale_b.dim() == 2:
            scale_b = scale_b.unsqueeze(1)
        elif of_b == "block" and self.is_along_k:
            scale_b = scale_b.expand(groups, -1, -1)
        if of_b != "block":
            scale_b = scale_b.expand(groups, 1, n)
        return scale_a.expand(groups, rows, scale_a.shape[-1]), scale_b

    def _granularity(self) -> tuple[Granularity, Granularity]:
        shapes = self.scale_a.shape, self.scale_b.shape
        return granularity(self.a, self.b, *shapes, self.group_rows.shape[0])


def out_shape(a: Tensor, b: Tensor, group_rows: Tensor) -> tuple[int, ...]:
    """(M, N) or (G, rows, N); with groups along K (G, M, N)."""
    of_groups = group_rows.shape[:1] if b.dim() == 2 else ()
    return (*of_groups, *a.shape[:-1], b.shape[-1])


def granularity(
    a: Tensor, b: Tensor, shape_a: torch.Size, shape_b: torch.Size, groups: int
) -> tuple[Granularity, Granularity]:
    """Of scale_a and of scale_b. Where shapes fit two meanings, both give the same product.

    Raises:
        ValueError: they fit none.
    """
    n, k, of_rows = b.shape[-1], a.shape[-1], tuple(a.shape[:-1])
    per_group = (groups, 1, 1)
    rows: tuple[tuple[int, ...], ...] = (of_rows, (*of_rows, 1))
    columns: tuple[tuple[int, ...], ...] = ((groups, n), (groups, 1, n))
    of_groups: tuple[int, ...] = (groups,)
    if b.dim() == 2:  # along K
        rows = ((groups * of_rows[0],), (groups, *of_rows, 1))
        columns = ((groups * n,), (groups, 1, n))
        of_groups = ()
    of_a = _outer_granularity(shape_a, per_group, rows)
    of_b = _outer_granularity(shape_b, per_group, columns)
    if of_a is not None and of_b is not None:
        return of_a, of_b
    blocks = (*of_rows, blocks_of(k)), (*of_groups, blocks_of(k), blocks_of(n))
    if not differ(shape_a, blocks[0]) and not differ(shape_b, blocks[1]):
        return "block", "block"
    raise ValueError(
        f"scale_a must have one element, shape {per_group}, {rows[0]} or {rows[1]}, and scale_b "
        f"one element, shape {per_group}, {columns[0]} or {columns[1]}; or, by blocks of {BLOCK}, "
        f"{blocks[0]} and {blocks[1]}; got {tuple(shape_a)} and {tuple(shape_b)}"
    )


def _outer_granularity(
    shape: torch.Size, per_group: tuple[int, ...], each: tuple[tuple[int, ...], ...]
) -> Granularity | None:
    if is_known(shape.numel() == 1):
        return "tensor"
    if not differ(shape, per_group):
        return "group"
    return "row" if any(not differ(shape, one) for one in each) else None


def check(
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    offs: Any,
    masked_m: Any,
    out_dtype: Any,
    out: Any,
    use_fast_accum: Any,
) -> GroupedProduct:
    """Raises TypeError and ValueError, naming the argument, its value and what is supported."""
    _check_matrices(a, b)
    group_rows = _group_rows(a, b, offs, masked_m)
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        require_tensor(name, scale, torch.float32, a)
    found = granularity(a, b, scale_a.shape, scale_b.shape, group_rows.shape[0])
    fast = require_bool("use_fast_accum", use_fast_accum)
    if fast and "block" in found:
        raise ValueError(
            "use_fast_accum must be False with scales of blocks, which are applied when a block "
            "is added to the sum"
        )
    return GroupedProduct(a, b, scale_a, scale_b, group_rows, _out_dtype(out_dtype, out), fast)


def check_out(out: Any, product: GroupedProduct) -> None:
    require_tensor("out", out, product.out_dtype, product.a)
    meaning = "(G, rows, N)" if product.is_apart else "(M, N)"
    meaning = "(G, M, N)" if product.is_along_k else meaning
    require_shape("out", out, product.out_shape, meaning)
    require_writable("out", out)
    if len(product.out_shape) == 3 and not out.is_contiguous():
        raise ValueError(
            "out must be contiguous with masked_m and with groups along K, got strides "
            f"{out.stride()}"
        )
    inputs = [x for x in product if isinstance(x, Tensor)]
    if not torch.compiler.is_compiling() and is_shared(out, inputs):
        raise ValueError("out must not share memory with an input")


def _check_matrices(a: Any, b: Any) -> None:
    require_tensor("a", a, E4M3)
    require_tensor("b", b, E4M3, a)
    if a.dim() not in (2, 3):
        raise ValueError(
            "a must have 2 dimensions (M, K), with offs, or 3 dimensions (G, rows, K), with "
            f"masked_m, got shape {tuple(a.shape)}"
        )
    if b.dim() != 3 and (b.dim() != 2 or a.dim() == 3):
        raise ValueError(
            "b must have 3 dimensions (G, K, N) or, with groups along K and a of 2 dimensions, 2 "
            f"dimensions (K, N), got shape {tuple(b.shape)}"
        )
    (of_b, n), k = b.shape[-2:], a.shape[-1]
    if differ((of_b,), (k,)):
        raise ValueError(
            f"b must have as many rows as a has columns, K = {k}, got shape {tuple(b.shape)}"
        )
    if a.dim() == 3 and differ(a.shape[:1], b.shape[:1]):
        raise ValueError(
            f"a and b must have as many groups, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if k % UNIT_K != 0:
        raise ValueError(f"K, the columns of a, must be a multiple of {UNIT_K}, got {k}")
    rows = a.shape[0] * (a.shape[1] if a.dim() == 3 else 1)
    if any(is_known(size > MOST) for size in (rows, n, k)):
        raise ValueError(
            f"rows of all groups, N and K must be at most {MOST}, got {rows}, {n} and {k}"
        )
    if k > 1 and a.stride(-1) != 1:
        raise ValueError(
            f"a must be row-major, its K contiguous, got strides {a.stride()}: call .contiguous()"
        )
    if k > 1 and b.stride(-2) != 1:
        given = "weights.transpose(1, 2) of contiguous weights (G, N, K)"
        given = "x.t() of a contiguous x (N, K)" if b.dim() == 2 else given
        raise ValueError(
            f"b must be column-major, its K contiguous, got strides {b.stride()}: pass {given}"
        )


def _group_rows(a: Tensor, b: Tensor, offs: Any, masked_m: Any) -> Tensor:
    name, value, other = ("offs", offs, masked_m) if a.dim() == 2 else ("masked_m", masked_m, offs)
    if value is None or other is not None:
        raise ValueError(
            "offs goes with a of 2 dimensions and masked_m with a of 3, and one of them is needed: "
            f"a has shape {tuple(a.shape)}, offs is {describe(offs)}, masked_m "
            f"{describe(masked_m)}"
        )
    require_tensor(name, value, INDEX_DTYPES, a)
    if b.dim() == 2:
        require_rank(name, value, 1, "(G,)")
    else:
        require_shape(name, value, b.shape[:1], "(G,)")
    groups = value.shape[0]
    rows = a.shape[0] * groups if b.dim() == 2 else groups
    if is_known(rows > MOST):
        raise ValueError(
            f"groups, along K with the rows of a in each, must be at most {MOST}, got {groups}"
        )
    return to_int32(value)  # type: ignore[no-any-return]


def _out_dtype(out_dtype: Any, out: Any) -> torch.dtype:
    if out_dtype is None and isinstance(out, Tensor):
        return require_tensor("out", out, WIDE).dtype
    if out_dtype is None:
        return torch.bfloat16
    if out_dtype not in WIDE:
        names = " or ".join(str(dtype) for dtype in WIDE)
        raise TypeError(f"out_dtype must be {names}, got {describe(out_dtype)}")
    return out_dtype  # type: ignore[no-any-return]
