"""The attention benchmark with a clock that does not measure: cases, peers, rows, the report."""

import dataclasses
import functools
import importlib
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import flash8
import oracle
from repository import BENCH

NAMES = (
    "bench_attention",
    "attention_cases",
    "attention_peers",
    "attention_peers_fp8",
    "attention_report",
    "environment",
)


@pytest.fixture(scope="module")
def bench():
    """The modules by name."""
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


@pytest.fixture
def small(bench):
    """A case of each kind, by kind."""
    cases = bench.attention_cases
    return {
        "dense": cases.dense("small", 2, 70, 4, 2, 16, True),
        "packed": cases.packed("small", (40, 1, 33), 4, 2, 16),
        "decode": cases.decode("small", 3, 64, 4, 2, 16),
    }


def fake_clock(calls, milliseconds=2.0):
    def time_call(call):
        calls.append(call())
        return {"median_ms": milliseconds, "p20_ms": 1.0, "p80_ms": 3.0, "runs": 1}

    return time_call


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("kind", ["dense", "packed", "decode"])
def test_the_reference_is_attention(bench, small, kind):
    call = bench.attention_cases.inputs(small[kind], "cpu", torch.float32)
    got = bench.attention_cases.reference(call)
    assert got.shape == call.q.shape
    tensors = [x.detach() for x in (call.q, call.k, call.v)]
    if kind == "packed":
        parts = zip(*(x.split(call.case.lengths) for x in tensors), strict=True)
        outs = [oracle.attention(*(x[None] for x in part), causal=True)[0] for part in parts]
        want = torch.cat(outs, dim=1)[0]
    else:
        want = oracle.attention(*tensors, causal=True)[0]
    assert relative(got, want) < 1e-6


def test_costs(bench, small):
    dense, packed, decode = (small[kind] for kind in ("dense", "packed", "decode"))
    assert dense.flops(backward=False) == 0.5 * 4 * 2 * 4 * 70 * 70 * 16
    assert dense.flops(backward=True) == 3.5 * dense.flops(backward=False)
    assert packed.flops(backward=False) == 0.5 * 4 * 4 * (40**2 + 1 + 33**2) * 16
    assert decode.flops(backward=False) == 4 * 3 * 4 * 64 * 16
    assert dense.least_bytes(2) == 2 * 70 * (2 * 4 + 2 * 2) * 16 * 2 + 4 * 2 * 70 * 4
    assert packed.least_bytes(2) == 74 * (2 * 4 + 2 * 2) * 16 * 2 + 4 * 74 * 4
    assert decode.score_bytes(2) == 3 * 4 * 64 * 2


def test_document_lengths_are_seeded_and_fill_the_batch(bench):
    lengths = bench.attention_cases.document_lengths(65536)
    assert lengths == bench.attention_cases.document_lengths(65536)
    assert sum(lengths) == 65536 and max(lengths) <= 8192
    ordered = sorted(lengths)
    assert 500 < ordered[len(ordered) // 2] < 1000  # the median
    assert ordered[-1] > 5 * ordered[len(ordered) // 2]  # the tail


def test_gpu_cases_are_those_of_the_paper_llama_packing_and_decoding(bench):
    cases = bench.attention_cases.gpu_cases()
    assert {case.suite for case in cases} == {"FA3 paper", "Llama-3", "packed", "decode"}
    for case in cases:
        if case.suite == "FA3 paper":
            assert case.batch * case.seqlen_q == 16384 and case.heads * case.head_dim == 2048
    equal = [case for case in cases if case.suite == "packed" and len(set(case.lengths)) < 2]
    assert len({case.flops(backward=False) for case in equal}) == 1 and len(equal) == 2


@pytest.mark.parametrize("kind", ["dense", "packed", "decode"])
def test_every_cpu_peer_is_right(bench, small, kind):
    call = bench.attention_cases.inputs(small[kind], "cpu", torch.float32)
    want = bench.attention_cases.reference(call)
    served = 0
    for peer in bench.attention_peers.peers("cpu"):
        if isinstance(peer, bench.attention_peers.Peer) and kind in peer.kinds:
            assert relative(peer.prepare(call)(call.q, call.k, call.v), want) < 1e-5, peer.name
            served += 1
    assert served == (1 if kind == "packed" else 3)


def fake_flash_attention(with_cache):
    """A module with FlashAttention's functions; they return (O, LSE)."""
    module = types.ModuleType("fake")
    pair = functools.partial
    module.flash_attn_func = pair(flash8.flash_attn_func, return_attn_probs=True)
    module.flash_attn_varlen_func = pair(flash8.flash_attn_varlen_func, return_attn_probs=True)
    if with_cache:
        module.flash_attn_with_kvcache = flash8.flash_attn_with_kvcache
    return module


def fake_flashinfer():
    """A module with FlashInfer's wrappers, as its documentation describes them."""

    class Prefill:
        def __init__(self, workspace, layout):
            assert layout == "NHD" and workspace.dtype == torch.uint8

        def plan(self, q_ends, k_ends, heads, heads_kv, head_dim, *, causal, q_data_type):
            self.ends, self.causal, self.shape = (q_ends, k_ends), causal, (heads, head_dim)

        def run(self, q, k, v):
            assert q.shape[1:] == self.shape
            longest = [int(ends.diff().max()) for ends in self.ends]
            return flash8.flash_attn_varlen_func(q, k, v, *self.ends, *longest, causal=self.causal)

    class Decode:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert layout == "NHD"

        def plan(self, starts, indices, last, heads, heads_kv, head_dim, page, *, q_data_type):
            assert (last == page).all()
            self.table = indices.view(last.shape[0], -1)
            self.lengths = starts.diff() * page

        def run(self, q, cache):
            assert q.dim() == 3
            lengths = {"cache_seqlens": self.lengths, "page_table": self.table}
            return flash8.flash_attn_with_kvcache(q[:, None], *cache, **lengths)[:, 0]

    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = Prefill
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    return module


def fake_cudnn():
    """A module with cuDNN's graphs, as far as FP8 attention takes them."""

    class Node:
        def __getattr__(self, name):  # set_dim, set_stride, ...
            assert name.startswith("set_")
            return lambda value: self

    class Graph:
        def __init__(self, **types):
            pass

        def tensor(self, *, name, dim, stride, data_type):
            assert len(dim) == len(stride) == 4 and data_type in ("e4m3", "fp32")
            return Node()

        def sdpa_fp8(self, *, attn_scale, use_causal_mask, generate_stats, **inputs):
            self.inputs, self.options = inputs, (attn_scale, use_causal_mask)
            self.out = Node()
            return self.out, None, Node(), Node()

        def get_workspace_size(self):
            return 0

        def execute(self, pack, workspace, handle):
            given = {name: pack[node] for name, node in self.inputs.items()}
            assert given["descale_s"] * given["scale_s"] == 1.0 and given["scale_o"] == 1.0
            tensors = [given[x].float() * given[f"descale_{x}"] for x in "qkv"]
            scale, causal = self.options
            pack[self.out].copy_(flash8.flash_attn_func(*tensors, scale, causal))

    for step in ("validate", "build_operation_graph", "check_support", "build_plans"):
        setattr(Graph, step, lambda self: None)
    Graph.create_execution_plans = lambda self, modes: None
    module = types.ModuleType("cudnn")
    module.pygraph, module.create_handle = Graph, lambda: "handle"
    module.data_type = types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="fp32")
    module.heur_mode = types.SimpleNamespace(A=0, FALLBACK=1)
    return module


@pytest.fixture
def gpu_peers(bench, monkeypatch):
    """The peers of a GPU that runs everything, on stand-ins that compute with flash8 or eagerly."""
    from torch.nn.attention.flex_attention import flex_attention

    def varlen_attn(q, k, v, *rest, window_size, enable_gqa):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return flash8.flash_attn_varlen_func(q, k, v, *rest, window_size=window_size)

    package = fake_flash_attention(with_cache=True)
    package.__path__ = []
    varlen = types.ModuleType("torch.nn.attention.varlen")
    varlen.varlen_attn = varlen_attn
    for name, module in {
        "cudnn": fake_cudnn(),
        "flash_attn_interface": fake_flash_attention(with_cache=True),
        "flash_attn": package,
        "flash_attn.cute": fake_flash_attention(with_cache=False),
        "flashinfer": fake_flashinfer(),
        "torch.nn.attention.varlen": varlen,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(bench.attention_peers, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(bench.attention_peers, "_PAGE_SIZE", 16)
    return {peer.name: peer for peer in bench.attention_peers.peers("cuda")}


GPU_PEERS = {
    "flex_attention": ("dense", "packed"),
    "varlen_attn": ("packed",),
    "flash_attn_3": ("dense", "packed", "decode"),
    "flash_attn_4": ("dense", "packed"),
    "flash_attn_2": ("dense", "packed", "decode"),
    "flash_attn_2, deterministic": ("dense", "packed"),
    "flash_attn_3, deterministic": ("dense", "packed"),
    "flash8, deterministic": ("dense", "packed"),
    "flash8 fp8_attention": ("dense", "packed"),
    "flashinfer": ("dense", "packed", "decode"),
    "flash_attn_3 e4m3": ("dense", "packed"),
    "flash_attn_3 e4m3, with quantization": ("packed",),
    "cudnn e4m3": ("dense",),
    "cudnn e4m3, with quantization": ("dense",),
    "flash8 e4m3 head": ("dense", "packed"),
    "flash8 e4m3 block, v_colmajor": ("dense", "packed"),
    "flash8 e4m3 head, with quantization": ("dense", "packed"),
    "flash8 e4m3 block": ("dense", "packed"),
    "flash8 e4m3 block, with quantization": ("dense", "packed"),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in GPU_PEERS.items() for kind in kinds]
)
def test_gpu_peers_are_called_as_they_want(bench, small, gpu_peers, name, kind):
    peer = gpu_peers[name]
    assert kind in peer.kinds
    call = bench.attention_cases.inputs(small[kind], "cpu", torch.float32)
    got = peer.prepare(call)(*(x.detach() for x in (call.q, call.k, call.v)))
    assert got.shape == call.q.shape
    bound = peer.tolerance if "e4m3" in name or "fp8" in name else 1e-5
    assert relative(got, bench.attention_cases.reference(call)) < bound


def test_a_peer_that_is_not_installed_says_why(bench):
    absent = [p for p in bench.attention_peers.peers("cuda") if not hasattr(p, "prepare")]
    assert {p.name for p in absent} >= {"flash_attn_3", "flashinfer"}
    assert all("ModuleNotFoundError" in p.reason or "ImportError" in p.reason for p in absent)


def test_a_run_measures_what_is_right_and_says_what_is_not(bench, small):
    peer_of = bench.attention_peers.Peer

    def unmasked(call):
        return lambda q, k, v: flash8.flash_attn_func(q, k, v)

    def refuses(call):
        raise bench.attention_peers.RefusedError("has no kernel for it")

    candidates = [
        *bench.attention_peers.peers("cpu"),
        peer_of("unmasked", unmasked, ("dense",)),
        peer_of("refuses", refuses, ("decode",)),
    ]
    calls = []
    results = bench.bench_attention.run(list(small.values()), candidates, "cpu", fake_clock(calls))
    rows = {(row["peer"], row["kind"]): row for row in results["rows"]}
    ours = rows["flash8", "dense"]
    assert ours["error"] < 1e-5
    assert ours["forward"]["tflops"] == pytest.approx(
        small["dense"].flops(backward=False) / 2e-3 * 1e-12
    )
    assert ours["both"]["tflops"] == pytest.approx(3.5 * ours["forward"]["tflops"])
    assert ours["forward"]["peak_bytes"] is None
    assert "both" not in rows["flash8", "decode"]
    wrong = rows["unmasked", "dense"]
    assert wrong["refused"].startswith("wrong: relative error") and "forward" not in wrong
    assert rows["refuses", "decode"]["refused"] == "RefusedError: has no kernel for it"
    assert results["matrix_tflops"]["before"] == pytest.approx(2 * 1024**3 / 2e-3 * 1e-12)
    assert results["absent"]["flashinfer"] == "needs a CUDA device"
    timed = [row for row in results["rows"] if "forward" in row]
    assert len(calls) == 2 + len(timed) + sum("both" in row for row in timed)
    json.dumps(results)


#: FlexAttention's gradients are for a GPU alone.
DIFFERENTIABLE = [
    *("flash8", "unfused", "varlen_attn", "flash8 fp8_attention"),
    *("flash_attn_3", "flash_attn_4", "flash_attn_2"),
    *("flash8, deterministic", "flash_attn_2, deterministic", "flash_attn_3, deterministic"),
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_gpu_peers_are_those_of_the_reference(bench, small, gpu_peers, name):
    peer = gpu_peers[name]
    assert peer.backward
    for kind in set(peer.kinds) - {"decode"}:
        case = small[kind]
        found = bench.bench_attention.gradient_error(peer, case, "cpu", torch.float32)
        assert found < (peer.gradient_tolerance if "fp8" in name else 1e-5)
        if kind == "dense" and "fp8" in name:  # whose bound is the widest
            halved = dataclasses.replace(peer, prepare=lambda call: halve(peer.prepare(call)))
            wrong = bench.bench_attention.gradient_error(halved, case, "cpu", torch.float32)
            assert wrong > peer.gradient_tolerance


def halve(attend):
    """Gradients of k half of what they are."""
    return lambda q, k, v: attend(q, 0.5 * k + (0.5 * k).detach(), v)


@pytest.mark.parametrize("name", ["flash8", "flash_attn_2", "flash_attn_3"])
def test_peers_are_asked_for_an_order(bench, small, gpu_peers, name, monkeypatch):
    """As the function of all of them is told; and where an order costs the most."""
    seen = []
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        original = getattr(flash8, function)
        spy = functools.partial(lambda f, *a, **k: seen.append(k) or f(*a, **k), original)
        monkeypatch.setattr(flash8, function, spy)
        for module in ("flash_attn_interface", "flash_attn"):
            monkeypatch.setattr(sys.modules[module], function, spy)
    peers = {peer.name: peer for peer in bench.attention_peers.peers("cuda")}
    for asked, peer in ((True, peers[f"{name}, deterministic"]), (False, peers[name])):
        for kind in ("dense", "packed"):
            call = bench.attention_cases.inputs(small[kind], "cpu", torch.float32)
            peer.prepare(call)(call.q, call.k, call.v)
            assert seen.pop().get("deterministic", False) == asked
        cases = bench.attention_cases
        long, short = (cases.dense("", 1, n, 8, 8, 128, True) for n in (8192, 1024))
        full = cases.dense("", 1, 8192, 8, 8, 128, False)
        wanted = [peer.wants(case) for case in (long, short, full)]
        assert wanted == [True, not asked, not asked]
        assert peer.forward != asked


def test_wrong_gradients_are_not_timed(bench, small):
    peer_of = bench.attention_peers.Peer

    def half(call):
        return halve(functools.partial(flash8.flash_attn_func, causal=True))

    def without(call):
        return lambda q, k, v: flash8.flash_attn_func(
            q.detach(), k.detach(), v.detach(), None, True
        )

    ordered = functools.partial(flash8.flash_attn_func, causal=True, deterministic=True)
    candidates = [
        peer_of("half", half, ("dense",)),
        peer_of("without", without, ("dense",)),
        peer_of("ordered", lambda call: ordered, ("dense",), forward=False),
    ]
    calls = []
    run = bench.bench_attention.run
    results = run([small["dense"]], candidates, "cpu", fake_clock(calls))
    half, without, ordered = results["rows"]
    assert half["backward_refused"].startswith("wrong: relative error 0.") and "forward" in half
    assert "does not require grad" in without["backward_refused"] and "both" not in without
    assert ordered["gradient_error"] < 1e-5 and "forward" not in ordered and "both" in ordered
    text = bench.attention_report.tables(results)
    assert "| refused: wrong: relative error" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_report_has_every_row_and_a_plot(bench, small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    results = bench.bench_attention.run(
        list(small.values()), list(bench.attention_peers.peers("cpu")), "cpu", fake_clock([])
    )
    (tmp_path / "attention_cpu.json").write_text(json.dumps(results))
    monkeypatch.setattr(bench.attention_report, "RESULTS", tmp_path)
    bench.attention_report.main()
    text = (tmp_path / "attention_cpu.md").read_text()
    for row in results["rows"]:
        assert f"| {bench.attention_report.label(row)} | {row['peer']} |" in text
    assert "- flashinfer: needs a CUDA device" in text
    assert (tmp_path / "attention_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "no results of cuda are committed" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("attention_*.json")))
def test_committed_tables_are_those_of_the_committed_results(bench, path):
    assert path.with_suffix(".md").read_text() == bench.attention_report.tables(
        json.loads(path.read_text())
    )


def test_the_clock_of_the_gpu_is_cold_and_warmed_up(monkeypatch):
    """Order of events on a fake torch.cuda: warm-up first, then flush, start, call, end."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = len(events)
            events.append("record")

        def elapsed_time(self, end):
            return float(end.at - self.at)

    class Flush:
        def zero_(self):
            events.append("flush")

    import gpu_timing

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(gpu_timing.torch, "empty", lambda *_, **__: Flush())
    timing = gpu_timing.time_call(lambda: events.append("call"), runs=3, warmup=2)
    assert events == [*["call"] * 2, *["flush", "record", "call", "record"] * 3, "wait"]
    assert timing.median_ms == 2.0 and timing.runs == 3
    sys.modules.pop("gpu_timing", None)


def test_sdpa_is_given_views(bench, small):
    """Heads-first peers must not be charged for copies."""
    seen = []

    def attend(q, k, v):
        seen.extend(x.data_ptr() for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    call = bench.attention_cases.inputs(small["dense"], "cpu", torch.float32)
    bench.attention_peers._heads_first(attend)(call.q, call.k, call.v)
    assert seen == [call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr()]
