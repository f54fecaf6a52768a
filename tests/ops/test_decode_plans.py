"""The plan cache of calls over a KV cache: which are hits and which are misses, and that both
launch the same."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fake_driver.cubin import LAYOUT
from flash8 import flash_attn_with_kvcache
from flash8.backends.hopper import streams
from flash8.ops import decode_plans, planned
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

E4M3 = torch.float8_e4m3fn
POINTERS = ("q", "qv", "k", "v", "o", "q_descale", "k_descale", "v_descale", "k_mean", "v_mean")
POINTERS += ("tree_mask",)
PAGES = ("page_table",)
SEQUENCES = ("cu_seqlens_q", "seqused_k", "leftpad_k", "kv_batch_idx")
SCORES = ("sinks", "alibi_slopes")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def draw(seed=0, dtype=torch.bfloat16):
    """Arguments of a paged call: two sequences, pages of 16 keys."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "q": tensor(2, 2, 8, 128).bfloat16(),
        "k_cache": tensor(9, 16, 2, 128).to(dtype),
        "v_cache": tensor(9, 16, 2, 128).to(dtype),
        "page_table": torch.randperm(9, generator=generator)[:8].view(2, 4).int(),
        "cache_seqlens": int32([60 - seed, 3]),
    }


def dense(seed=0):
    given = draw(seed)
    del given["page_table"]
    return {**given, "k_cache": given["k_cache"][:2], "v_cache": given["v_cache"][:2]}


def per_head():
    return torch.full((2, 2), 0.5)


def e4m3(seed=0):
    means = {f"{x}_mean": torch.ones(2, 128) for x in "kv"}
    return {**draw(seed, E4M3), "k_descale": per_head(), "v_descale": per_head(), **means}


def packed(seed=0):
    given = draw(seed)
    ends = {"cu_seqlens_q": int32([0, 1, 4]), "max_seqlen_q": 3}
    return {**given, **ends, "q": given["q"].flatten(0, 1)}


def absorbed(seed=0):
    """Absorbed MLA: views of one cache."""
    given = draw(seed)
    both = torch.zeros(9, 16, 2, 576).bfloat16()
    q, qv = (torch.ones(2, 2, 8, d).bfloat16() for d in (64, 512))
    return {**given, "q": q, "qv": qv, "k_cache": both[..., 512:], "v_cache": both[..., :512]}


def by_key(seed=0):
    """K's descales by token, V's by page."""
    scales = {"k_descale": torch.ones(9, 16, 2), "v_descale": torch.ones(9, 2, 1)}
    return {**draw(seed, E4M3), **scales}


def e4m3_queries(seed=0):
    given = e4m3(seed)
    return {**given, "q": given["q"].to(E4M3), "q_descale": torch.ones(2, 8)}


SINKS = torch.linspace(-1.0, 2.0, 8)
#: Of every kind that leaves a plan.
CALLS = {
    "paged": lambda seed: draw(seed),
    "dense": lambda seed: dense(seed),
    "all of a dense cache": lambda seed: {**dense(seed), "cache_seqlens": None},
    "e4m3": lambda seed: e4m3(seed),
    "descales by key": lambda seed: by_key(seed),
    "e4m3 queries": lambda seed: e4m3_queries(seed),
    "a tree": lambda seed: {**draw(seed), "tree_mask": int32([[1, 3], [1, 2]])},
    "splits": lambda seed: {**draw(seed), "split_keys": 64},
    "absorbed MLA": lambda seed: absorbed(seed),
    "packed": lambda seed: packed(seed),
    "masks": lambda seed: {**draw(seed), "causal": True, "window_size": (40, 0), "sm_margin": 3},
    "softcap": lambda seed: {**draw(seed), "softcap": 3.0, "alibi_slopes": torch.ones(8)},
    "sinks": lambda seed: {**draw(seed), "s_aux": SINKS.clone()},
    "sinks in bf16": lambda seed: {**draw(seed), "s_aux": SINKS.bfloat16()},
    "padding": lambda seed: {
        **draw(seed),
        "cache_leftpad": int32([1, 2]),
        "cache_batch_idx": int32([1, 0]),
    },
    "output": lambda seed: {**draw(seed), "out": torch.empty(2, 2, 8, 128).bfloat16()},
}


def parts(parameters: bytes):
    """The fields of DecodeParams that a call's tensors are pointed to by, and their addresses."""
    fields = LAYOUT["DecodeParams"]["fields"]
    places = {name: fields[name][0] for name in (*POINTERS, "lse", "partials", "tickets")}
    for struct, part, names in (
        ("SequenceParams", "sequences", SEQUENCES),
        ("ScoreParams", "scores", SCORES),
        ("PageParams", "pages", PAGES),
    ):
        inner = LAYOUT[struct]["fields"]
        places |= {name: fields[part][0] + inner[name][0] for name in names}
    return {
        name: (at, int.from_bytes(parameters[at : at + 8], "little")) for name, at in places.items()
    }


def without_addresses(parameters: bytes) -> bytes:
    cleared = bytearray(parameters)
    for name, (at, address) in parts(parameters).items():
        cleared[at : at + 8] = (name not in ("lse",) and address != 0).to_bytes(8, "little")
    for name in ("tma_k", "tma_v"):
        at = LAYOUT["DecodeParams"]["fields"][name][0]
        cleared[at + 16 : at + 24] = bytes(8)  # as the fake driver packs a map
    return bytes(cleared)


def run(given, **others):
    return flash_attn_with_kvcache(**{**given, **others})


@pytest.mark.parametrize("name", CALLS)
def test_a_hit_launches_what_a_miss_does(name, fake, on_fake_driver, misses):
    first, second = CALLS[name](0), CALLS[name](1)
    run(first)
    run(second)
    assert misses == ["launch"] and len(fake.launches) == 2
    decode_plans.cache().clear()
    whole = run(second)
    launches, parameters = fake.launches, [fake.parameter(i) for i in range(3)]
    assert launches[1] == launches[2]
    assert without_addresses(parameters[1]) == without_addresses(parameters[2])
    again = run(second)
    assert (again.shape, again.dtype, again.stride()) == (whole.shape, whole.dtype, whole.stride())
    found = {field: address for field, (_, address) in parts(fake.parameter(3)).items()}
    assert found["o"] == again.data_ptr()
    names = {"k": "k_cache", "v": "v_cache", "seqused_k": "cache_seqlens"}
    names |= {"leftpad_k": "cache_leftpad", "kv_batch_idx": "cache_batch_idx", "sinks": "s_aux"}
    for field in (*POINTERS, *PAGES, *SEQUENCES, *SCORES):
        tensor = second.get(names.get(field, field))
        if field == "o" or (field == "sinks" and name == "sinks in bf16"):
            continue
        assert found[field] == (0 if tensor is None else tensor.data_ptr()), field
    assert len(misses) == 2 and found["partials"] != 0 != found["tickets"]


def test_a_hit_returns_what_a_miss_does(on_fake_driver, misses):
    given = draw()
    whole, again = (run(given, return_softmax_lse=True) for _ in range(2))
    assert len(misses) == 1 and len(whole) == len(again) == 4
    for a, b in zip(whole, again, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    out = torch.empty_like(given["q"])
    assert all(run(given, out=out) is out for _ in range(2))


CHANGES = {
    "rows": lambda x: {"q": x["q"][:, :1]},
    "strides": lambda x: {"k_cache": x["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)},
    "dtype": lambda x: {name: x[name].half() for name in ("q", "k_cache", "v_cache")},
    "pages": lambda x: {"page_table": x["page_table"][:, :3].contiguous()},
    "no lengths": lambda x: {
        "page_table": None,
        "k_cache": x["k_cache"][:2],
        "v_cache": x["v_cache"][:2],
    },
    "scale": lambda x: {"softmax_scale": 0.3},
    "tree": lambda x: {"tree_mask": int32([[1, 3], [1, 2]])},
    "splits": lambda x: {"split_keys": 64},
    "mask": lambda x: {"causal": True},
    "window": lambda x: {"window_size": (5, 0)},
    "margin": lambda x: {"sm_margin": 1},
    "sink": lambda x: {"s_aux": SINKS},
    "softcap": lambda x: {"softcap": 2.0},
    "padding": lambda x: {"cache_leftpad": int32([0, 1])},
    "output": lambda x: {"out": torch.empty_like(x["q"])},
    "LSE": lambda x: {"return_softmax_lse": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_call_is_a_miss(name, on_fake_driver, misses):
    given = draw()
    run(given)
    run(given, **CHANGES[name](given))
    assert len(misses) == 2


#: Whose launch points to something that was made for it.
WITHOUT = {
    "a length": {"cache_seqlens": 40},
    "int64 lengths": {"cache_seqlens": torch.tensor([60, 3])},
    "lengths with gaps": {"cache_seqlens": int32([60, 0, 3, 0])[::2]},
    "a table with gaps": {"page_table": torch.zeros(2, 8, dtype=torch.int32)[:, ::2]},
    "an expanded mean": {"k_mean": torch.ones(2, 1).expand(2, 128)},
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_made_for_a_launch_is_made_for_each(name, fake, on_fake_driver, misses):
    given = e4m3() if "mean" in name else draw()
    given |= WITHOUT[name]
    for _ in range(3):
        run(given)
    assert len(misses) == 3 == len(fake.launches)
    assert len(decode_plans.cache()) == 0


def test_a_tensor_that_changes_in_place_is_the_same_call(fake, on_fake_driver, misses):
    given = draw()
    run(given)
    given["cache_seqlens"].fill_(7)
    given["page_table"].zero_()
    run(given)
    assert len(misses) == 1 and len(fake.launches) == 2
    given["cache_seqlens"].resize_(1)
    with pytest.raises(ValueError, match="cache_seqlens"):
        run(given)


def test_other_tensors_of_the_kind_are_what_a_hit_reads(fake, on_fake_driver, misses):
    given = draw()
    run(given)
    wide = torch.zeros(8, dtype=torch.int32)
    given["cache_seqlens"] = wide[3:5]
    given["q"] = torch.zeros(3, 2, 8, 128).bfloat16()[1:]
    run(given)
    found = parts(fake.parameter(1))
    assert len(misses) == 1
    assert found["seqused_k"][1] == wide.data_ptr() + 12
    assert found["q"][1] == given["q"].data_ptr()


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_an_unaligned_tensor_is_a_miss(name, on_fake_driver, misses):
    given = draw()
    run(given)
    x = given[name]
    further = torch.empty(x.numel() + 1).bfloat16()[1:].view(x.shape).copy_(x)
    run(given, **{name: further})
    assert len(misses) == 2


@contextmanager
def forward_mode():
    with torch.autograd.forward_ad.dual_level():
        yield


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [forward_mode, Dispatching, Functions])
def test_a_call_that_somebody_watches_goes_through_the_op(mode, on_fake_driver, misses):
    given = draw()
    run(given)
    with mode():
        run(given)
    assert misses == ["launch", "op"]


def test_a_transform_goes_through_the_op(on_fake_driver, misses):
    given = draw()
    run(given)
    q = given.pop("q")
    torch.func.vmap(lambda x: run(given, q=x))(q[None])
    assert "op" in misses


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "s_aux"])
def test_gradients_go_through_the_op(name, on_fake_driver, misses):
    given = {**draw(), "s_aux": SINKS.clone()}
    run(given)
    given[name] = given[name].detach().requires_grad_()
    assert run(given).requires_grad
    with torch.no_grad():
        assert not run(given).requires_grad
    assert misses == ["launch", "op"]


def test_a_gradient_for_what_has_none_is_for_the_op(on_fake_driver, misses):
    """Which refuses slopes that require grad."""
    given = {**e4m3(), "alibi_slopes": torch.ones(8)}
    run(given)
    run(given, k_descale=per_head().requires_grad_())
    assert misses == ["launch", "op"]
    with pytest.raises(ValueError, match="alibi_slopes"):
        run(given, alibi_slopes=torch.ones(8, requires_grad=True))


def test_an_output_over_an_argument_is_refused_again(fake, on_fake_driver):
    given = draw()
    run(given, out=torch.empty_like(given["q"]))
    before = len(fake.launches)
    with pytest.raises(ValueError, match="out must not share memory"):
        run(given, out=given["q"])
    assert len(fake.launches) == before


BAD = {
    "causal": 1,
    "softmax_scale": True,
    "softcap": False,
    "window_size": (True, False),
    "attention_chunk": False,
    "num_splits": True,
    "sm_margin": False,
    "return_softmax_lse": 0,
    "rotary_interleaved": 1,
    "cache_seqlens": 2.0,
    "rotary_cos": torch.ones(60, 16),
    "cu_seqlens_k_new": int32([0, 1, 2]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_good_value_is_still_refused(name, on_fake_driver):
    given = draw()
    run(given, softmax_scale=1.0, window_size=(1, 0))
    run(given, softmax_scale=1.0)
    with pytest.raises((TypeError, ValueError)):
        run(given, **{"softmax_scale": 1.0, name: BAD[name]})


def test_a_captured_hit_has_tickets_of_its_own(fake, on_fake_driver, misses):
    given, tickets = draw(), []
    for captured in (False, True, True, False):
        fake.capture(captured)
        run(given)
        tickets.append(parts(fake.parameter(len(fake.launches) - 1))["tickets"][1])
    fake.capture(False)
    of_stream = streams.get_tickets(torch.device("cpu"), 0, streams.MANY_TICKETS).data_ptr()
    assert tickets[0] == tickets[3] == of_stream and len(misses) == 1
    assert of_stream not in tickets[1:3]


def test_launches_of_a_stream_share_what_they_scratch_in(fake, on_fake_driver):
    """Its address is the stream's; what is too small is replaced, and a graph has its own."""
    given, scratch = draw(), []
    wider = {name: given[name].repeat_interleave(2, -1) for name in ("q", "k_cache", "v_cache")}
    for others, captured in (({}, False), ({}, False), (wider, False), ({}, True), ({}, False)):
        run(given, **others)
        fake.capture(captured)
        run(given, **others)
        scratch.append(parts(fake.parameter(len(fake.launches) - 1))["partials"][1])
        fake.capture(False)
    assert scratch[0] == scratch[1] and scratch[2] == scratch[4]
    assert len(set(scratch)) == 3


def test_scratch_memory_is_bounded(on_fake_driver):
    """split_keys takes as much as the room of a cache, which must not be kept for every size."""
    given = draw()
    room = {"page_table": torch.zeros(2, 1 << 25, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"split_keys is 64: for a cache with room for .* MB"):
        run(given, split_keys=64, **room)
    assert run(given, split_keys=1 << 26, **room).shape == given["q"].shape


def test_there_are_no_more_plans_than_so_many(on_fake_driver, monkeypatch):
    monkeypatch.setattr(planned, "MOST_PLANS", 3)
    given = draw()
    for margin in range(10):
        run(given, sm_margin=margin)
        assert len(decode_plans.cache()) <= 3


def test_threads_share_the_plans(fake, on_fake_driver):
    given = [draw(seed) for seed in range(4)]

    def work(i):
        for j in range(50):
            if i == 0 and j % 10 == 0:
                decode_plans.cache().clear()
            out = run(given[i % 4], sm_margin=j % 3)
            assert out.shape == (2, 2, 8, 128)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(fake.launches) == 400


GIVEN = draw()
#: Values that look alike, of which some arguments take some.
VALUES = {
    "q": [GIVEN["q"], GIVEN["q"].half(), GIVEN["q"][:, :1], GIVEN["q"].detach().requires_grad_()],
    "k_cache": [GIVEN["k_cache"], GIVEN["k_cache"][:5], torch.nn.Parameter(GIVEN["k_cache"])],
    "v_cache": [GIVEN["v_cache"], GIVEN["v_cache"].half(), GIVEN["v_cache"][..., :64]],
    "k": [None, torch.zeros(2, 1, 2, 128).bfloat16()],
    "page_table": [GIVEN["page_table"], GIVEN["page_table"].long(), GIVEN["page_table"][:, ::2]],
    "cache_seqlens": [GIVEN["cache_seqlens"], 40, True, 40.0, None, torch.tensor([3, 4])],
    "cache_leftpad": [None, int32([1, 2]), int32([1, 2, 3]), 0],
    "cache_batch_idx": [None, int32([1, 0]), torch.tensor([1, 0])],
    "softmax_scale": [None, 1, 1.0, True, 0.0, 2**70],
    "causal": [False, True, 0, 1],
    "window_size": [(-1, -1), (1, 0), (True, False), [1, 0], (1,)],
    "softcap": [0.0, 0, 1, True],
    "num_splits": [1, 0, True, 2],
    "sm_margin": [0, 1, True, -1],
    "max_seqlen_q": [None, 2, True],
    "return_softmax_lse": [False, True, 1],
    "rotary_interleaved": [True, False, 1],
    "s_aux": [None, SINKS, SINKS.half(), SINKS.bfloat16(), SINKS[:4]],
    "alibi_slopes": [None, torch.ones(8), torch.ones(16)[::2], torch.ones(8, requires_grad=True)],
    "out": [None, torch.empty_like(GIVEN["q"]), GIVEN["q"], torch.empty(3)],
    "k_descale": [None, torch.ones(()), 1.0],
    "qv": [None, torch.zeros_like(GIVEN["q"])],
}


def outcome(fake, arguments):
    """The exception that a call raises, or what it returns and launches, all but addresses."""
    launches = len(fake.launches)
    try:
        result = flash_attn_with_kvcache(**arguments)
    except Exception as error:
        return type(error), str(error)
    tensors = result if isinstance(result, tuple) else (result,)
    kinds = [(x.shape, x.dtype, x.stride(), x.requires_grad) for x in tensors]
    new = range(launches, len(fake.launches))
    return kinds, [(fake.launches[i], without_addresses(fake.parameter(i))) for i in new]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(2))
def test_no_plan_changes_a_call(seed, fake, on_fake_driver, misses):
    choose = random.Random(seed)
    calls = hits = 0
    for _ in range(30):
        good = {name: choices[0] for name, choices in VALUES.items()}
        name = choose.choice(sorted(VALUES))
        good[name] = choose.choice(VALUES[name])
        outcome(fake, good)  # leaves a plan, if it is good
        for name in choose.sample(sorted(VALUES), 4):
            arguments = {**good, name: choose.choice(VALUES[name])}
            seen = len(misses)
            cached = [outcome(fake, arguments) for _ in range(2)]
            hits += len(misses) - seen < 2 and isinstance(cached[1][0], list)
            decode_plans.cache().clear()
            assert cached == [outcome(fake, arguments)] * 2, (good, name)
            calls += 1
    assert hits > calls / 8


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_a_hit_computes_what_a_miss_does(on_simulated_device, misses):
    """With other lengths and pages, too, as a server replays a call."""
    first, second = e4m3(0), e4m3(1)
    run(first, return_softmax_lse=True)
    out, lse, *_ = run(second, return_softmax_lse=True)
    assert len(misses) == 1
    decode_plans.cache().clear()
    want, want_lse, *_ = run(second, return_softmax_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and len(misses) == 2
