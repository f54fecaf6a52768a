"""The torch ops of attention: schema, fake, autograd and the backends behind each dispatch key.

Every public function ends in a torch op, so `torch.compile`, `torch.export` and autograd see an
opaque node with exact shapes. The tail of each attention op's schema is `options.SCHEMA`.
"""

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash8 import backends
from flash8.backends import (
    backend_for,
    backward_backend,
    choose_num_splits,
    cpu,
    forward_backend,
    index_checks,
)
from flash8.call import checks, derivatives
from flash8.call.autocast import unaffected
from flash8.call.geometry import Geometry
from flash8.call.observed import is_autocast_on
from flash8.call.options import SCHEMA, Arguments, Options, without_tensors
from flash8.ops import autograd, backward_plans, batching, unseen
from flash8.ops.outputs import (
    ForwardResult,
    Gradients,
    empty_forward,
    empty_gradients,
    empty_lse_and_partials,
    empty_tangents,
)

if TYPE_CHECKING:
    from flash8.backends.protocol import Forward

_library = torch.library.Library("flash8", "DEF")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? qv, Tensor? s_aux"
_library.define(f"forward({_INPUTS}, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"forward_out({_INPUTS}, Tensor(a!) out, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward(Tensor? dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "jvp(Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, Tensor? qv_tangent, "
    f"Tensor? s_aux_tangent, {_INPUTS}, Tensor lse, {SCHEMA}) -> (Tensor, Tensor)"
)
_library.define(
    "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
    "Tensor? cu_seqlens_k_new, Tensor? page_table, Tensor? kv_batch_idx) -> ()"
)


#: The backend of a call on its way to the op, if it has been asked for before.
_known_backend: "contextvars.ContextVar[Forward | None]" = contextvars.ContextVar(
    "_known_backend", default=None
)


@contextmanager
def _served_by(backend: "Forward") -> Iterator[None]:
    token = _known_backend.set(backend)
    try:
        yield
    finally:
        _known_backend.reset(token)


def _backend_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    out: Tensor | None = None,
) -> "Forward":
    return _known_backend.get() or forward_backend(q, k, v, qv, options, out)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, s_aux: Tensor | None, *options: Any
) -> ForwardResult:
    return _with_partials(*_forward_past_op(q, k, v, qv, s_aux, Options(*options)))


def _with_partials(out: Tensor, lse: Tensor, *partials: Tensor) -> ForwardResult:
    if not partials:
        partials = (lse.new_empty((0,)), lse.new_empty((0,)))
    return ForwardResult(out, lse, *partials)


def _forward_past_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """O and LSE, and the partials where there are any."""
    backend = _backend_of(q, k, v, qv, options)
    if backend is cpu:
        made = cpu.forward_batch(q, k, v, qv, s_aux, options)
        if made is not None:
            return made
    out, lse, *partials = empty_forward(q, v, options)
    backend.forward(q, k, v, qv, s_aux, options, out, lse, *partials)
    return (out, lse) if options.num_splits == 1 else (out, lse, *partials)


def _forward_planned(
    plan: cpu.Plan, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """`_forward_past_op` of a call that has a plan of `cpu.plan_batch`."""
    made = cpu.forward_planned(q, k, v, plan)
    return _forward_past_op(q, k, v, *others) if made is None else made


def _forward_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    opts = Options(*options)
    increment_version((out,))  # a kernel writes past torch
    lse, out_partial, lse_partial = empty_lse_and_partials(q, v, opts)
    backend = _backend_of(q, k, v, qv, opts, out)
    backend.forward(q, k, v, qv, s_aux, opts, out, lse, out_partial, lse_partial)
    return lse, out_partial, lse_partial


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> Gradients:
    opts = Options(*options)
    saved = (q, k, v, qv, s_aux, out, lse)
    done = backward_plans.find(saved, dout, dlse, opts)
    if done is not None:
        dq, dk, dv, ds_aux = done
        nothing = q.new_empty((0,))
        return Gradients(dq, dk, dv, nothing, q.new_empty((0,)) if ds_aux is None else ds_aux)
    backend = backward_backend(q, k, v, qv, opts)
    if backend is cpu:
        made = cpu.backward_batch(dout, dlse, *saved, opts)
        if made is not None:
            return Gradients(*made, q.new_empty((0,)), q.new_empty((0,)))
    gradients = empty_gradients(q, k, v, qv, s_aux)
    plan = backend.backward(dout, dlse, *saved, opts, *gradients)
    if plan is not None:
        backward_plans.keep(plan, saved, dout, dlse, opts)
    return gradients


def _jvp(
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    qv_tangent: Tensor | None,
    s_aux_tangent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    opts = Options(*options)
    tangents = empty_tangents(q, v, lse, opts)
    given = (q_tangent, k_tangent, v_tangent, qv_tangent, s_aux_tangent)
    backend_for(q).jvp(*given, q, k, v, qv, s_aux, lse, opts, *tangents)
    return tangents


def _append_kv(k_cache: Tensor, v_cache: Tensor, *rest: Any) -> None:
    backend_for(k_cache).append_kv(k_cache, v_cache, *rest)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, s_aux: Tensor | None, *options: Any
) -> ForwardResult:
    return empty_forward(q, v, Options(*options))


def _forward_out_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_lse_and_partials(q, v, Options(*options))


def _backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    *rest: Any,
) -> Gradients:
    return empty_gradients(q, k, v, qv, s_aux)


def _jvp_fake(
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    qv_tangent: Tensor | None,
    s_aux_tangent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return empty_tangents(q, v, lse, Options(*options))


def _append_kv_fake(*args: Any) -> None:
    return None


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: ForwardResult) -> None:
    q, k, v, qv, s_aux, *rest = inputs
    out, lse, out_partial, lse_partial = output
    ctx.mark_non_differentiable(out_partial, lse_partial)
    options = Options(*rest)
    kept = without_tensors(options)
    saved = autograd.save(ctx, (q, k, v, qv, s_aux), (out, lse), options._asdict(), kept)
    ctx.save_for_forward(*saved)


def _forward_autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> Any:
    return (*autograd.gradients(ctx, dout, dlse), *(None,) * len(Options._fields))


def _forward_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
    return (*autograd.tangents(ctx, tangents), None, None)


_WRITES = (
    "flash8 writes in place here (out=, or keys that are appended to a cache), which has no "
    "derivative; leave out=None, detach what is differentiated, or append under torch.no_grad() "
    "and attend in a call of its own"
)


def _register() -> None:
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "forward": (_forward, _forward_fake),
        "forward_out": (_forward_out, _forward_out_fake),
        "backward": (_backward, _backward_fake),
        "jvp": (_jvp, _jvp_fake),
        "append_kv": (_append_kv, _append_kv_fake),
    }
    for name, (implementation, fake) in implementations.items():
        for key in ("CPU", "CUDA"):
            _library.impl(name, unaffected(derivatives.refuse_tangents(implementation)), key)
        torch.library.register_fake(f"flash8::{name}", fake, lib=_library)
        batching.register(_library, name, merges=name in ("forward", "backward", "jvp"))
    for name, formulas in (
        ("forward", derivatives.Formulas(_forward_setup, _forward_autograd, _forward_jvp)),
        ("backward", derivatives.NO_SECOND_ORDER),
        ("jvp", derivatives.NO_SECOND_ORDER),
    ):
        derivatives.register(_library, name, formulas)
    for name in ("forward_out", "append_kv"):
        derivatives.refuse(_library, name, _WRITES)


_register()
_unseen_forward = unaffected(_forward_past_op)
_unseen_planned = unaffected(_forward_planned)
#: What the op does, called by a node of autograd that nobody watches.
backward_past_op = unaffected(_backward)


def resolve_num_splits(q: Tensor, geometry: Geometry, options: Options) -> Options:
    """Replaces num_splits = 0 by the backend's choice, so that shapes are known before the op. Over
    a cache 1 is no split at all, on kernels too, which cut sequences where their shares end."""
    if options.num_splits == 0:
        return options._replace(num_splits=choose_num_splits(q.device, geometry, options))
    over_cache = options.is_cache or options.page_table is not None
    if (
        over_cache
        and options.num_splits == 1
        and options.split_keys == 0
        and backends.kernels_wanted(q)
    ):
        return options._replace(split_keys=checks.NO_SPLIT)
    return options


def check_indices(q: Tensor, k: Tensor, options: Options) -> None:
    """Checks the data of index tensors and descales ahead of an in-place change: of CPU tensors,
    of others with FLASH8_CHECK_INDICES=1."""
    if torch.compiler.is_compiling():
        return
    if q.device.type == "cpu":
        backend_for(q).check_indices(q, k, options)
        backend_for(q).check_values(q, k, options)
    else:
        index_checks.check_attention(q, k, options)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor | None,
    options: Options,
    backend: "Forward | None" = None,
) -> ForwardResult:
    """The forward op, or its in-place twin where `out` is given; what the op does, where nobody
    sees the difference: a tenth of a millisecond, which a short CPU call has no use for. `backend`
    serves the call, where that is known."""
    if backend is None:
        return _run_forward(q, k, v, qv, s_aux, out, options)
    with _served_by(backend):
        return _run_forward(q, k, v, qv, s_aux, out, options)


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor | None,
    options: Options,
) -> ForwardResult:
    if out is None:
        inputs = (q, k, v, s_aux)
        if qv is None and unseen.may_run(inputs, options):
            return _with_partials(*unseen.run(_unseen_forward, inputs, options))
        return ForwardResult(*torch.ops.flash8.forward(q, k, v, qv, s_aux, *options))
    return ForwardResult(out, *torch.ops.flash8.forward_out(q, k, v, qv, s_aux, out, *options))


def run_unseen(arguments: Arguments, known: unseen.Known) -> tuple[Tensor, Tensor]:
    """O and LSE of a call that `unseen` has found to be checked."""
    inputs = (arguments["q"], arguments["k"], arguments["v"], arguments.get("s_aux"))
    if known.plan is None:
        forward = _unseen_forward
    elif is_autocast_on() or unseen.wants_node(inputs):
        forward = functools.partial(_unseen_planned, known.plan)
    else:
        made = cpu.forward_planned(*inputs[:3], known.plan)
        if made is not None:
            return made
        forward = _unseen_forward
    out, lse, *_ = unseen.run(forward, inputs, known.options)
    return out, lse
