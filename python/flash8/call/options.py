"""The one list of everything that shapes an attention call besides its differentiable tensors.

The order of the fields here is the order of the arguments of `flash8::forward`,
`flash8::forward_out` and `flash8::backward` after the tensors; `SCHEMA` is derived from it, so
schema, fake, autograd and backends can never disagree.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

#: An attention call by name, as the caller made it: q, k, v, and any of qv, s_aux, out, window_size
#: and raw values of `Options`. Nothing in it has to be valid.
Arguments = dict[str, Any]


class Options(NamedTuple):
    """Non-differentiable arguments of one attention call. Shapes as in `flash8.attention`."""

    q_descale: Tensor | None = None  # fp32, shapes as in `flash8.tensors.descales`
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    k_mean: Tensor | None = None  # fp32 (heads_kv, d) or (batch, heads_kv, d)
    v_mean: Tensor | None = None
    v_channel_descale: Tensor | None = None  # fp32 (heads_kv, d_v) or (batch, heads_kv, d_v)
    cu_seqlens_q: Tensor | None = None  # int32 (batch + 1,)
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None  # int32 (batch,)
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None  # int32 (batch,)
    page_table: Tensor | None = None  # int32 (batch or cache batch, max_pages)
    kv_batch_idx: Tensor | None = None  # int32 (batch,)
    alibi_slopes: Tensor | None = None  # fp32 (heads,) or (batch, heads)
    tree_mask: Tensor | None = None  # int32 (batch, seqlen_q) or (total_q,), a word of bits each
    dropout_seed: Tensor | None = None  # int64 (1,)
    dropout_p: float = 0.0
    softmax_scale: float | None = None  # None: (head_dim [+ head_dim_v with qv]) ** -0.5
    causal: bool = False
    window_left: int = -1  # -1: unbounded
    window_right: int = -1
    attention_chunk: int = 0  # 0: off
    softcap: float = 0.0  # 0: off
    num_splits: int = 1  # already resolved: at least 1
    pack_gqa: bool | None = None
    deterministic: bool = False
    smooth_k: bool = False  # K without its mean where dQ is made
    sm_margin: int = 0
    v_colmajor_tokens: int | None = None  # of a v as `flash8.tensors.v_colmajor` has it
    is_cache: bool = False  # k and v are a KV cache, of which a few queries see much
    split_keys: int = 0  # keys after each of which a sequence may be split, nowhere else; 0: any

    @classmethod
    def of(cls, arguments: Arguments) -> "Options":
        """Those of a call; what it does not give has its default."""
        return cls(**{name: arguments[name] for name in cls._fields if name in arguments})

    @property
    def is_local(self) -> bool:
        """Whether the mask is a band or chunks rather than none or causal."""
        return self.window_left >= 0 or self.window_right >= 0 or self.attention_chunk > 0

    @property
    def is_scaled(self) -> bool:
        """Whether a descale or a mean is given."""
        descales = (self.q_descale, self.k_descale, self.v_descale, self.v_channel_descale)
        return any(x is not None for x in (*descales, self.k_mean, self.v_mean))

    def scale(self, q: Tensor, qv: Tensor | None = None) -> float:
        """What scores are multiplied by: softmax_scale, or its default."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        return 1.0 / math.sqrt(q.shape[-1] + (0 if qv is None else qv.shape[-1]))

    def head_dim_v(self, v: Tensor) -> int:
        """The channels of v, whichever way it lies."""
        return v.shape[-1] if self.v_colmajor_tokens is None else v.shape[-2]


_SCHEMA_TYPES: dict[object, str] = {
    Tensor | None: "Tensor?",
    int | None: "SymInt?",
    float | None: "float?",
    bool | None: "bool?",
    int: "SymInt",
    float: "float",
    bool: "bool",
}

#: The options that are tensors, in order.
TENSOR_FIELDS = tuple(x for x, kind in Options.__annotations__.items() if kind == Tensor | None)

#: "Tensor? q_descale, ..., SymInt? v_colmajor_tokens": the tail of every attention op's schema.
SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[annotation]} {name}" for name, annotation in Options.__annotations__.items()
)


class WithoutTensors(NamedTuple):
    """Options that keep no tensor alive, as a plan and a node of autograd have them."""

    tensors: tuple[str, ...]  # the names of those that are tensors
    numbers: Options  # the others; those are None here

    def with_tensors(self, tensors: Iterable[Any]) -> Options:
        """The options, with tensors in the order of their names."""
        return self.numbers._replace(**dict(zip(self.tensors, tensors, strict=True)))


def without_tensors(options: Options) -> WithoutTensors:
    names = tuple(name for name in TENSOR_FIELDS if getattr(options, name) is not None)
    nothing: dict[str, Any] = dict.fromkeys(names)
    return WithoutTensors(names, options._replace(**nothing))
