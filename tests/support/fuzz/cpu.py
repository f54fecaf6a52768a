"""The leg of CPU tensors: against float64, and hostile arguments to every public function."""

import functools
import random
from collections.abc import Callable
from typing import Any

import torch

import flash8
from cases import Case, build, call_of, check_backward, cumulative, int32
from flash8 import fp8
from fuzz import damage, targets
from fuzz.calls import attention_call, cache_call, damaged, judge
from fuzz.harness import attempt, bits, shown


def call(seed: int) -> str:
    """One call, and a correct one after it if it was hostile."""
    rng = random.Random(f"cpu {seed}")
    kind = rng.random()
    if kind < 0.08:
        return backward(rng)
    if kind < 0.5:
        return against_the_oracle(rng)
    return hostile(rng)


def prepare() -> None:
    _right()


def against_the_oracle(rng: random.Random) -> str:
    """A call that is a little damaged or not at all: refused with a useful message, or right."""
    name, arguments = rng.choice([attention_call, attention_call, cache_call])(rng)
    times = rng.choice([0, 1, 1, 1, 2, 3])
    for _ in range(times):
        victim = rng.choice(sorted(arguments))
        arguments[victim] = damaged(rng, arguments[victim])
    verdict = judge(name, arguments, undamaged=times == 0)
    if verdict == "refused":
        expect_right_bits(rng)
    return verdict


def backward(rng: random.Random) -> str:
    """Gradients of a correct call, against those of the oracle."""
    length = lambda: rng.choice([0, 1, 3, 17, 40])  # noqa: E731
    layout = rng.choice(["dense", "packed", "paged"])
    batch = rng.choice([1, 2])
    lengths = [tuple(length() for _ in range(batch)) for _ in "qk"]
    if layout == "dense":
        lengths = [each[:1] * batch for each in lengths]
    heads, heads_kv = rng.choice([(1, 1), (4, 2)])
    check_backward(
        build(
            Case(
                *lengths,
                layout=layout,
                page_size=rng.choice([1, 4]),
                heads=heads,
                heads_kv=heads_kv,
                head_dim=rng.choice([1, 8, 24]),
                head_dim_v=rng.choice([8, 40]),
                dtype=rng.choice([torch.float64, torch.float32]),
                causal=rng.random() < 0.5,
                window_size=rng.choice([(-1, -1), (3, 2), (-1, 0)]),
                attention_chunk=rng.choice([0, 0, 7]),
                softcap=rng.choice([0.0, 2.5]),
                alibi=rng.choice([None, "h", "bh"]),
                sink=rng.random() < 0.3,
                dropout_p=rng.choice([0.0, 0.0, 0.3]),
            ),
            rng.randrange(2**30),
        ),
        ulps=2.0,
    )
    return "right gradients"


def hostile(rng: random.Random) -> str:
    """Anything for arguments; gradients too, of whatever is returned."""
    function, arguments = targets.draw(rng)
    spoilt = damage.spoil(rng, arguments, rng.choice([1, 1, 2, 3, 5]))
    verdict, result = attempt(function, spoilt)
    if verdict == "returned":
        out = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(out, torch.Tensor) and out.requires_grad and out.device.type == "cpu":
            attempt(_gradient, {"out": out})
    try:
        expect_right_bits(rng)
    except AssertionError as error:
        raise AssertionError(f"{error}; before it {function.__name__}({shown(spoilt)})") from error
    return f"hostile {verdict}"


def _gradient(out: torch.Tensor) -> Any:
    return out.sum().backward()


# ---- correct calls, and the bits that they gave at first ----


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    rng = random.Random(7)
    return [targets.randn(rng, *shape, dtype=dtype) for shape in shapes]


def _dense() -> Any:
    q, k, v = _leaves((2, 9, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    return flash8.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)


def _varlen() -> Any:
    name, arguments = call_of(build(Case((5, 0, 9), (7, 4, 20), layout="packed", causal=True)))
    return getattr(flash8, name)(**arguments)


def _fp8() -> Any:
    q, k, v = (x.to(torch.float8_e4m3fn) for x in _leaves(*[(1, 8, 2, 16)] * 3))
    descale = torch.linspace(0.5, 1.5, 2).view(1, 2)
    return flash8.flash_attn_func(q, k, v, k_descale=descale, v_descale=descale)


def _cache() -> Any:
    q, k, v, new = _leaves((2, 1, 4, 16), (6, 4, 2, 16), (6, 4, 2, 16), (2, 1, 2, 16))
    table = int32([0, 1, 2, 3, 4, 5]).view(2, 3)
    lengths = int32([3, 8])
    found = flash8.flash_attn_with_kvcache(
        q, k, v, new, new, cache_seqlens=lengths, page_table=table, causal=True, num_splits=2
    )
    return found, k, v


def _gradients() -> Any:
    q, k, v = (x.requires_grad_() for x in _leaves(*[(1, 9, 2, 8)] * 3, dtype=torch.float32))
    out = flash8.flash_attn_func(q, k, v, causal=True, dropout_p=0.3, dropout_seed=11)
    return out, torch.autograd.grad(out.square().sum(), [q, k, v])


def _quantized() -> Any:
    (x,) = _leaves((20, 2, 64))
    made = fp8.quantize(x, "block", smooth_k=True, hadamard=3, cu_seqlens=cumulative([4, 0, 16]))
    return made.data, made.descale, made.mean


_CORRECT: list[Callable[[], Any]] = [_dense, _varlen, _fp8, _cache, _gradients, _quantized]


@functools.cache
def _right() -> list[Any]:
    return [bits(correct()) for correct in _CORRECT]


def expect_right_bits(rng: random.Random) -> None:
    """One of the correct calls gives what it gave before anything hostile was called."""
    right = _right()
    which = rng.randrange(len(right))
    found = bits(_CORRECT[which]())
    assert found == right[which], f"{_CORRECT[which].__name__} no longer gives the right bits"
