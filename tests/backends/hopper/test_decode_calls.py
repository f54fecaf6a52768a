"""flash_attn_with_kvcache on the decode kernel: which calls it takes, what they give, and what it
refuses by name. CPU tensors, on the simulated device."""

import warnings

import pytest
import torch

import flash8
from decode_cases import E4M3
from fake_driver.cubin import LAYOUT, any_cubin
from flash8 import _native, flash_attn_with_kvcache
from flash8.backends.hopper import decode, streams
from flash8.backends.hopper import kernels as hopper_kernels
from flash8.call.options import Options
from forward_cases import device, int32
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


def draw(page_size=16, batch=3, seqlen_q=1, heads=8, heads_kv=2, width=128, dtype=torch.bfloat16):
    """q, and caches of as many pages as three sequences of 100 keys take."""
    generator = torch.Generator().manual_seed(5)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    columns = -(-100 // page_size)
    cache = [tensor(batch * columns + 1, page_size, heads_kv, width) for _ in "kv"]
    table = torch.randperm(batch * columns + 1, generator=generator)[: batch * columns]
    lengths = int32([100, 1, 67][:batch])
    given = {"page_table": table.view(batch, columns).int(), "cache_seqlens": lengths}
    return [tensor(batch, seqlen_q, heads, width), *cache], given


def absorbed(page_size=16, heads=16, seqlen_q=1):
    """Queries of absorbed MLA, and views of one cache."""
    generator = torch.Generator().manual_seed(6)
    (q, both, _), given = draw(page_size, heads=heads, heads_kv=1, seqlen_q=seqlen_q, width=576)
    qv = torch.randn((*q.shape[:-1], 512), generator=generator).to(q.dtype)
    return [q[..., 512:], both[..., 512:], both[..., :512]], {**given, "qv": qv}


def to_e4m3(tensors, given):
    q, *cache = tensors
    heads_kv = cache[0].shape[2]
    scales = {f"{x}_descale": torch.full((3, heads_kv), 0.25 + i) for i, x in enumerate("kv")}
    return [q, *(x.to(E4M3) for x in cache)], {**given, **scales}


def queries_to_e4m3(tensors, given):
    q, *cache = tensors
    return [q.to(E4M3), *cache], {**given, "q_descale": torch.tensor(0.75)}


def by_key(tensors, given):
    """K's descales by token, V's by page, or by block of a dense cache."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (x.to(E4M3) if i else x for i, x in enumerate(tensors))
    blocks = 1 if "page_table" in given else -(-k.shape[1] // 128)
    shapes = {"k_descale": k.shape[:3], "v_descale": (k.shape[0], k.shape[2], blocks)}
    scales = {n: 0.5 + torch.rand(shape, generator=generator) for n, shape in shapes.items()}
    return [q, k, v], {**given, **scales}


def dense(page_size=100, **options):
    tensors, given = draw(page_size, **options)
    given.pop("page_table")
    q, *cache = tensors
    return [q, *(x[:3] for x in cache)], given


@pytest.fixture
def launched(monkeypatch):
    """The names of the decode kernels that calls inside took."""
    names = []
    plan = decode.plan

    def named(q, k, v, s_aux, options, out, lse, qv=None, variant=None, new=None):
        names.append((variant or decode.choose(q, k, v, options, qv)).name)
        return plan(q, k, v, s_aux, options, out, lse, qv, variant, new)

    monkeypatch.setattr(decode, "plan", named)
    return names


def run(monkeypatch, tensors, given, call=flash_attn_with_kvcache):
    with device().serving_cpu_tensors(monkeypatch):
        return call(*tensors, return_softmax_lse=True, **given)[:2]


def agree(found, want, of_o=1e-2):
    for x, y, bound in zip(found, want, (of_o, 1e-4), strict=True):
        finite = torch.isfinite(y)
        assert torch.equal(finite, torch.isfinite(x))
        torch.testing.assert_close(x[finite], y[finite], atol=bound, rtol=bound)


CALLS = {
    "paged": (draw(), "decode_bf16_d128_rows8"),
    "queries": (draw(seqlen_q=6), "decode_bf16_d128_rows32"),
    "pages of three keys": (to_e4m3(*draw(3)), "decode_bf16_e4m3_d128_rows8_gather"),
    "dense": (dense(), "decode_bf16_d128_rows8"),
    "e4m3": (to_e4m3(*dense()), "decode_bf16_e4m3_d128_rows8"),
    "absorbed MLA": (absorbed(seqlen_q=2), "decode_bf16_d64x512_rows32_qv"),
    "absorbed MLA, e4m3": (to_e4m3(*absorbed()), "decode_bf16_e4m3_d64x512_rows16_qv"),
    "e4m3 queries": (queries_to_e4m3(*to_e4m3(*dense())), "decode_bf16_e4m3_d128_rows8"),
    "descales by key": (by_key(*draw(16)), "decode_bf16_e4m3_d128_rows8_keyscales"),
    "of pages of three": (by_key(*draw(3)), "decode_bf16_e4m3_d128_rows8_gather_keyscales"),
    "of a dense cache": (by_key(*dense()), "decode_bf16_e4m3_d128_rows8_keyscales"),
    "more rows": (by_key(*dense(seqlen_q=20)), "decode_bf16_e4m3_d128_rows32_keyscales"),
}


@needs_compiler
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_it_takes(name, launched, monkeypatch):
    (tensors, given), kernel = CALLS[name]
    given = {**given, "causal": True}
    # The portable code rounds P to e4m3 where q is.
    agree(
        run(monkeypatch, tensors, given),
        flash_attn_with_kvcache(*tensors, return_softmax_lse=True, **given)[:2],
        2e-2 if tensors[0].dtype == E4M3 else 1e-2,
    )
    assert launched == [kernel]


@needs_compiler
def test_other_arguments(launched, monkeypatch):
    tensors, given = to_e4m3(*draw(seqlen_q=2))
    given |= {"cache_leftpad": int32([3, 0, 67]), "cache_batch_idx": int32([2, -1, 0])}
    given |= {"s_aux": torch.linspace(-1, 1, 8), "window_size": (40, 0)}
    given |= {"k_mean": torch.linspace(-1, 1, 256).view(2, 128)}
    given |= {"v_mean": torch.linspace(-1, 1, 768).view(3, 2, 128)}
    given["cache_seqlens"] = given["cache_seqlens"].long()
    want = flash_attn_with_kvcache(*tensors, return_softmax_lse=True, **given)[:2]
    out = torch.empty_like(tensors[0])
    found = run(monkeypatch, tensors, {**given, "out": out})
    agree(found, want)
    assert found[0] is out and len(launched) == 1


def test_the_type_of_o_is_that_of_the_kernel():
    """bf16 for e4m3 queries, unless `out` says otherwise."""
    (q, k, v), _ = queries_to_e4m3(*to_e4m3(*dense()))
    options = Options(is_cache=True)
    out = torch.empty(q.shape, dtype=torch.float16)
    assert decode.choose(q, k, v, options).dtype == "bf16"
    assert decode.choose(q, k, v, options, None, out).dtype == "fp16"


@needs_compiler
def test_drafts_and_splits(launched, monkeypatch):
    tensors, given = draw(seqlen_q=5)
    words = torch.randint(0, 2**31, (3, 5), generator=torch.Generator().manual_seed(1))
    given |= {"tree_mask": (words | 1 << torch.arange(5)).int(), "split_keys": 64}
    want = flash_attn_with_kvcache(*tensors, return_softmax_lse=True, **given)[:2]
    agree(run(monkeypatch, tensors, given), want)
    assert launched == ["decode_bf16_d128_rows32"]


def long_cache(batch=(0, 1, 2)):
    """Sequences that take several CTAs; those of `batch`, with q and pages of their own."""
    generator = torch.Generator().manual_seed(8)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    q, k, v = tensor(3, 1, 4, 64), tensor(3, 1408, 2, 64), tensor(3, 1408, 2, 64)
    lengths = int32([1400, 900, 1100])
    rows = list(batch)
    return [x[rows] for x in (q, k, v)], {"cache_seqlens": lengths[rows]}


def over_pages(q, k, v, cache_seqlens, **options):
    """By the varlen function. 22 pages of 64 keys a sequence."""
    batch = q.shape[0]
    return flash8.flash_attn_varlen_func(
        q.flatten(0, 1),
        *(x.view(-1, 64, 2, 64) for x in (k, v)),
        torch.arange(batch + 1).int(),
        None,
        1,
        1408,
        seqused_k=cache_seqlens,
        page_table=torch.arange(22 * batch).view(batch, 22).int(),
        return_attn_probs=True,
        **options,
    )


@needs_compiler
@pytest.mark.parametrize("function", ["cache", "pages"])
def test_one_split_is_independent_of_neighbours(function, launched, monkeypatch):
    """As in FA3, whose heuristics split for 0 alone: then shares depend on the batch."""

    def attend(batch, num_splits):
        (q, k, v), given = long_cache(batch)
        given["num_splits"] = num_splits
        if function == "pages":
            o, lse = over_pages(q, k, v, **given)
            return o, lse.transpose(0, 1)
        o, lse, *partials = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **given)
        assert all(x.numel() == 0 for x in partials)
        return o, lse

    with device().serving_cpu_tensors(monkeypatch):
        together, shared = (attend((0, 1, 2), n) for n in (1, 0))
        for b in range(3):
            alone = attend((b,), 1)
            assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))
    assert not torch.equal(together[0], shared[0])
    assert launched == ["decode_bf16_d64_rows8"] * 3  # the others are hits


@needs_compiler
def test_packed_queries_and_new_keys(launched, monkeypatch):
    tensors, given = draw(seqlen_q=2)
    q, *cache = tensors
    given |= {"cu_seqlens_q": int32([0, 2, 3, 6]), "max_seqlen_q": 3, "causal": True}
    given |= {x: torch.randn(3, 1, 2, 128).bfloat16() for x in ("k", "v")}
    given["cache_seqlens"] = int32([90, 1, 67])
    copies = [[q.reshape(6, 8, 128), *(x.clone() for x in cache)] for _ in range(2)]
    want = flash_attn_with_kvcache(*copies[0], return_softmax_lse=True, **given)[:2]
    agree(run(monkeypatch, copies[1], given), want)
    assert all(torch.equal(x, y) for x, y in zip(*copies, strict=True))
    assert len(launched) == 1


REFUSED = {
    "num_splits": (lambda *x: x, {"num_splits": 2}, "num_splits has no decode kernel yet"),
    "qv": (
        lambda *x: x,
        {"qv": torch.zeros(3, 1, 8, 128).bfloat16()},
        "head_dim is 128 and head_dim_v 128; with qv it is",
    ),
    "rows": (
        lambda q, k, v: (q.repeat(1, 65, 1, 1), k.to(E4M3), v.to(E4M3)),
        {"k_descale": torch.ones(22, 2, 1)},
        "k_descale is per token, block or page.*up to 256 rows.*there are 260",
    ),
    "narrow": (
        lambda q, k, v: (q[..., :40], k[..., :40].to(E4M3), v[..., :40].to(E4M3)),
        {},
        "head_dim is 40; the decode kernel takes multiples of 16",
    ),
    "pages' descales of wide heads": (
        lambda q, k, v: (q.repeat(1, 1, 1, 4), *(x.repeat(1, 1, 1, 4).to(E4M3) for x in (k, v))),
        {"k_descale": torch.ones(22, 2, 1)},
        "k_descale is per token, block or page; with qv, or head_dims above 256",
    ),
    "pages' descales of wide keys": (
        lambda q, k, v: (q.repeat(1, 1, 1, 4), k.repeat(1, 1, 1, 4).to(E4M3), v.to(E4M3)),
        {"v_descale": torch.ones(22, 2, 1)},
        "v_descale is per token, block or page; with qv, or head_dims above 256",
    ),
    "pages' descales with qv": (
        lambda q, k, v: (q[..., :64], k[..., :64].to(E4M3), v.to(E4M3)),
        {"qv": torch.zeros(3, 1, 8, 128).bfloat16(), "k_descale": torch.ones(22, 2, 1)},
        "k_descale is per token, block or page; with qv, or head_dims above 256",
    ),
    "expanded": (
        lambda q, k, v: (q, k[:1].expand(22, -1, -1, -1), v),
        {},
        "rows of the cache share memory",
    ),
    "scale": (lambda *x: x, {"softmax_scale": 1e-40}, "softmax_scale is 1e-40; kernels take"),
    "alignment": (
        lambda q, k, v: (q, torch.cat([k, k], dim=-1)[..., 4:132], v),
        {},
        "not aligned to 16 bytes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_names(name, launched, monkeypatch):
    """The portable code serves them, and says why."""
    change, more, words = REFUSED[name]
    tensors, given = draw()
    tensors, given = list(change(*tensors)), {**given, **more}
    flash8.backends._warn_of_refusal.cache_clear()
    with pytest.warns(UserWarning, match=words), device().serving_cpu_tensors(monkeypatch):
        found = flash_attn_with_kvcache(*tensors, **given)
    assert torch.equal(found, flash_attn_with_kvcache(*tensors, **given))
    assert launched == []


def test_what_no_forward_kernel_would_take_has_the_decode_kernels_reason(launched, monkeypatch):
    """Not that of head dimensions, which are right."""
    (q, k, v), given = absorbed(page_size=100)
    given = {**given, "page_table": None}  # a row of the cache for a sequence
    tensors = [q, k[:3], v[:3]]
    flash8.backends._warn_of_refusal.cache_clear()
    with pytest.warns(UserWarning, match="num_splits has no decode kernel yet"):
        run(monkeypatch, tensors, {**given, "num_splits": 2})
    assert launched == []


def test_a_cache_without_pages_is_for_the_portable_code(launched, monkeypatch):
    """O = 0, LSE = -inf."""
    q, k, v = (x.to(E4M3) if i else x for i, x in enumerate(draw()[0]))
    flash8.backends._warn_of_refusal.cache_clear()
    given = {"page_table": int32([[]] * 3), "cache_seqlens": int32([0] * 3)}
    with pytest.warns(UserWarning, match="the cache has no keys"):
        o, lse = run(monkeypatch, [q, k[:0], v[:0]], given)
    assert not o.any() and (lse == -float("inf")).all() and launched == []


@needs_compiler
def test_a_dense_cache_without_keys_is_for_the_forward_kernel(launched, monkeypatch):
    q, k, v = (x.to(E4M3) if i else x for i, x in enumerate(draw()[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o, lse = run(monkeypatch, [q, k[:3, :0], v[:3, :0]], {})
    assert not o.any() and (lse == -float("inf")).all() and launched == []


def test_more_rows_of_a_dense_cache_are_for_the_forward_kernel(launched, on_fake_driver, fake):
    tensors, given = dense(seqlen_q=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attn_with_kvcache(*tensors, **given)
    assert launched == [] and "forward" in fake.launches[-1]


@pytest.fixture
def tickets(monkeypatch):
    """Those of every launch, kept so that no two can have the same memory."""
    kept = []
    get = streams.get_tickets

    def get_tickets(*args):
        kept.append(get(*args))
        return kept[-1]

    monkeypatch.setattr(streams, "get_tickets", get_tickets)
    return kept


def test_a_captured_call_is_one_launch_with_tickets_of_its_own(
    fake, driver, tickets, monkeypatch, on_fake_driver
):
    """Nothing is read from the device, the first time neither."""
    registry = _native.Registry(driver, any_cubin)
    monkeypatch.setattr(hopper_kernels, "registry", lambda: registry)
    tensors, given = draw()
    for captured in (True, True, False, False):
        fake.capture(captured)
        before = fake.count("cuLaunchKernelEx")
        flash_attn_with_kvcache(*tensors, **given)
        assert fake.count("cuLaunchKernelEx") == before + 1
    assert fake.count("cuMemcpyDtoH_v2") == 0
    at = LAYOUT["DecodeParams"]["fields"]["tickets"][0]
    first, second, third, fourth = (fake.parameter(i)[at : at + 8] for i in range(4))
    assert len({first, second, third}) == 3 and third == fourth
