"""torch integration: opcheck, compile, export, checkpointing; import time and memory."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import flash8
from cases import Case, as_leaves, build, gradients, int32, run_flash8, upstream

# ------------------------------------------------------------------------------------- opcheck

OPCHECK = {
    "dense": Case((9, 9), (13, 13), dtype=torch.float32),
    "causal gqa sink": Case(
        (9, 9), (13, 13), heads=4, heads_kv=2, causal=True, sink=True, dtype=torch.float32
    ),
    "everything": Case(
        (9, 9),
        (13, 13),
        dtype=torch.float64,
        window_size=(4, 2),
        softcap=2.0,
        alibi="bh",
        sink=True,
        qv=True,
    ),
    "dropout": Case((9, 9), (13, 13), dtype=torch.float32, dropout_p=0.2),
    "packed": Case((5, 0, 9), (7, 4, 0), layout="packed", dtype=torch.float32),
    "paged": Case((5, 2, 9), (7, 4, 3), layout="paged", page_size=4, dtype=torch.float32),
    "splits": Case((3,), (300,), dtype=torch.float32, num_splits=2),
    "bfloat16": Case((9, 9), (13, 13), dtype=torch.bfloat16),
}


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers every flash8 op with its arguments, as the dispatcher has them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flash8":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(function):
    with _Recorder() as recorder:
        function()
    return recorder.calls


def check(op, args, grad=()):
    """opcheck on fresh copies, those at the positions `grad` as leaves that require it."""
    fresh = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
    for position in grad:
        if fresh[position] is not None:
            fresh[position].requires_grad_()
    torch.library.opcheck(op, tuple(fresh))


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_forward(name):
    ((op, args),) = recorded(lambda: run_flash8(build(OPCHECK[name])))
    assert op is torch.ops.flash8.forward.default
    check(op, args, grad=() if name == "splits" else range(5))


@pytest.mark.parametrize("name", ["everything", "packed", "paged", "dropout"])
def test_opcheck_backward(name):
    problem = build(OPCHECK[name])
    for leaf in problem.leaves().values():
        leaf.requires_grad_()
    out, lse = run_flash8(problem)
    calls = recorded(lambda: (out.sum() + torch.nan_to_num(lse, neginf=0.0).sum()).backward())
    (args,) = [args for op, args in calls if op is torch.ops.flash8.backward.default]
    check(torch.ops.flash8.backward.default, args)


def test_opcheck_forward_out():
    problem = build(OPCHECK["causal gqa sink"])
    out = torch.empty_like(problem.q)
    ((op, args),) = recorded(lambda: run_flash8(problem, out=out))
    assert op is torch.ops.flash8.forward_out.default
    check(op, args)


@pytest.mark.parametrize("table", [False, True])
def test_opcheck_append(table):
    k_cache, v_cache, k, v = torch.randn(2, 2, 8, 1, 4), torch.randn(2, 2, 8, 1, 4), None, None
    k, v = torch.randn(2, 2, 3, 1, 4)
    extra = dict(page_table=int32([[1], [0]])) if table else {}
    calls = recorded(
        lambda: flash8.flash_attn_with_kvcache(
            torch.randn(2, 3, 1, 4), k_cache[0], v_cache[0], k, v, cache_seqlens=2, **extra
        )
    )
    (args,) = [args for op, args in calls if op is torch.ops.flash8.append_kv.default]
    check(torch.ops.flash8.append_kv.default, args)


def test_opcheck_combine():
    parts = torch.randn(3, 2, 5, 2, 4), torch.randn(3, 2, 5, 2)
    calls = recorded(lambda: flash8.flash_attn_combine(*parts))
    check(*calls[0], grad=(0, 1))


def test_every_public_op_has_an_opcheck():
    """A new op of the core list must come here."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "flash8::" in n}
    assert {"forward", "forward_out", "backward", "append_kv", "combine"} <= names


# ------------------------------------------------------------------------------ torch.compile


def model(q, k, v):
    out, lse = flash8.flash_attn_func(q * 1.5, k, v, causal=True, return_attn_probs=True)
    return out.sin().sum(dim=(1, 2)), lse.exp().mean()


def packed_model(q, k, v, cu, sink):
    out = flash8.flash_attn_varlen_func(
        q, k, v, cu, cu, 64, 64, causal=True, window_size=(9, 0), s_aux=sink
    )
    return out * 2


def both(function, compiled, *tensors):
    """Values and gradients of the eager and the compiled function."""
    results = []
    for run in (function, compiled):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(x.square().sum() for x in outputs)
        wanted = [x for x in leaves if x.requires_grad]
        results.append((outputs, torch.autograd.grad(loss, wanted)))
    (eager, eager_grads), (fast, fast_grads) = results
    torch.testing.assert_close(eager, fast)
    torch.testing.assert_close(eager_grads, fast_grads)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    q = torch.randn(2, 9, 4, 8)
    k, v = torch.randn(2, 2, 13, 2, 8)
    both(model, compiled, q, k, v)


def test_compile_with_dynamic_shapes_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiles = []
    # No two sizes are equal: duck sizing would take them for one.
    for batch, seqlen_q, seqlen_k in [(3, 9, 13), (5, 12, 17), (7, 33, 20)]:
        q = torch.randn(batch, seqlen_q, 4, 8)
        k, v = torch.randn(2, batch, seqlen_k, 2, 8)
        both(model, compiled, q, k, v)
        compiles.append(counter.frame_count)
    assert len(set(compiles)) == 1, f"compiled again for new sizes: {compiles}"


def test_compile_varlen():
    compiled = torch.compile(packed_model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 7, 2], [64, 1], [3, 0, 9, 9]):
        cu = int32([0, *lengths]).cumsum(0).to(torch.int32)
        q, k, v = torch.randn(3, sum(lengths), 2, 8)
        both(packed_model, compiled, q, k, v, cu, torch.randn(2))


def test_compile_dropout_with_a_given_seed():
    def run(q, seed):
        return flash8.flash_attn_func(q, q, q, dropout_p=0.3, dropout_seed=seed)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 12, 2, 8)
    for seed in (torch.tensor([3]), torch.tensor([4])):
        torch.testing.assert_close(run(q, seed), compiled(q, seed))
    assert not torch.equal(compiled(q, torch.tensor([3])), compiled(q, torch.tensor([4])))


def test_compile_kv_cache_updates_in_place():
    def step(q, k_cache, v_cache, k, v, lengths):
        return flash8.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, num_splits=1
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 1, 2, 8)
    k_cache, v_cache = torch.randn(2, 2, 16, 2, 8)
    other = k_cache.clone(), v_cache.clone()
    lengths = int32([3, 7])
    expected = step(q, k_cache, v_cache, k, v, lengths)
    torch.testing.assert_close(compiled(q, *other, k, v, lengths), expected)
    assert torch.equal(other[0], k_cache) and torch.equal(other[1], v_cache)


# --------------------------------------------------------------------------- export, checkpoint


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.sink = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return flash8.flash_attn_func(q, k, v, causal=True, s_aux=self.sink).flatten(2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic):
    module, x = Attention(), torch.randn(2, 10, 16)
    dims = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("s", min=2, max=4096)}
    program = torch.export.export(module, (x,), dynamic_shapes=({**dims},) if dynamic else None)
    torch.testing.assert_close(program.module()(x), module(x))
    if dynamic:
        longer = torch.randn(3, 77, 16)
        torch.testing.assert_close(program.module()(longer), module(longer))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "flash8.forward.default" in targets


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_activation_checkpointing(dropout_p, reentrant):
    """With a drawn seed too: checkpoint restores the generator, so the mask replays."""

    def block(q, k, v):
        return flash8.flash_attn_func(q, k, v, causal=True, dropout_p=dropout_p).tanh()

    tensors = [torch.randn(1, 20, 2, 8, dtype=torch.float64) for _ in range(3)]
    results = []
    for wrapped in (False, True):
        torch.manual_seed(11)
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = checkpoint(block, *leaves, use_reentrant=reentrant) if wrapped else block(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)] if not reentrant else [out])
        if reentrant:
            out.sum().backward()
            results[-1] += [x.grad for x in leaves]
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


def test_threads_do_not_disturb_each_other():
    """Different calls, forward and backward, from four threads at once."""

    def run(seed):
        problem = as_leaves(build(Case((60,), (90,), causal=seed % 2 == 0, sink=True), seed))
        d_out, d_lse = upstream(problem)
        return gradients(problem, run_flash8, d_out, d_lse)

    alone = [run(seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(16)))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_meta_tensors_get_shapes_without_work():
    q = torch.randn(2, 10**6, 4, 64, device="meta", dtype=torch.bfloat16)
    out, lse = flash8.flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 10**6) and out.device.type == "meta"


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q = torch.randn(2, 100, 4, 16, requires_grad=True)
        out = flash8.flash_attn_func(q, q, q)
        assert out.shape == q.shape
        (grad,) = torch.autograd.grad(out.sum(), [q])
        assert grad.shape == q.shape


# ------------------------------------------------------------------------- import and memory


def in_subprocess(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_import_adds_little_to_torch():
    code = """
        import time, torch
        start = time.process_time()
        import flash8
        print(time.process_time() - start)
    """
    best = min(float(in_subprocess(code)[0]) for _ in range(2))
    assert best < 0.3, f"import flash8 took {best:.3f} s of CPU time after torch"


def test_import_brings_nothing_heavy():
    code = """
        import sys, torch
        before = set(sys.modules)
        import flash8
        print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))
    """
    brought = set(in_subprocess(code))
    heavy = {"numpy", "matplotlib", "tqdm", "triton", "cuda", "scipy", "transformers"}
    assert not brought & heavy


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_in_seqlen(backward):
    """The peak above the inputs; S alone would be seqlen^2 * 4 bytes = 16 MiB and 256 MiB."""
    code = f"""
        import resource, torch, flash8
        torch.set_num_threads(1)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def run(seqlen):
            q = torch.randn(1, seqlen, 1, 16, requires_grad={backward})
            out = flash8.flash_attn_func(q, q, q, causal=True)
            if {backward}:
                out.sum().backward()
        run(512)
        start = peak()
        run(2048)
        middle = peak()
        run(8192)
        print(middle - start, peak() - middle)
    """
    _, growth = (float(x) for x in in_subprocess(code))
    assert growth < 48, f"8k tokens took {growth:.0f} MiB more than 2k"
