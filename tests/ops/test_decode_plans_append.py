"""The plan cache of calls over a KV cache that append: a hit launches what a miss does, and is none
where the new rows must not be written so."""

import pytest
import torch

from fake_driver.cubin import LAYOUT
from flash8 import flash_attn_with_kvcache
from flash8.append import NewKeys
from flash8.backends.hopper import decode_append, kernels, mode
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.verify import trust
from flash8.compiler import MissingVariantError
from flash8.ops import attention as ops
from flash8.ops import decode_plans
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

E4M3 = torch.float8_e4m3fn
WIDTH, ROTARY = 64, 32


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def unread(monkeypatch):
    """Of CPU tensors the checks read values, which here no kernel writes."""
    monkeypatch.setattr(NewKeys, "_check_positions", lambda *_: None)
    monkeypatch.setattr(ops, "check_indices", lambda *_: None)


@pytest.fixture
def ahead(monkeypatch):
    """The append is a launch of its own, ahead of attention."""
    monkeypatch.setattr(decode_append, "choose", lambda *_: None)


def draw(seed=0, dtype=torch.bfloat16, rows=(2, 1)):
    """Two sequences with new rows, over pages of 16 keys."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "q": tensor(*rows, 8, WIDTH).bfloat16(),
        "k_cache": tensor(9, 16, 2, WIDTH).to(dtype),
        "v_cache": tensor(9, 16, 2, WIDTH).to(dtype),
        "k": tensor(*rows, 2, WIDTH).bfloat16(),
        "v": tensor(*rows, 2, WIDTH).bfloat16(),
        "page_table": torch.randperm(9, generator=generator)[:8].view(2, 4).int(),
        "cache_seqlens": int32([50 - seed, 3]),
        "causal": True,
    }


def dense(seed=0):
    given = draw(seed)
    del given["page_table"]
    caches = {name: given[name].flatten(0, 1)[:128].view(2, 64, 2, WIDTH) for name in CACHES}
    return {**given, **caches, "cache_batch_idx": int32([1, 0])}


def e4m3(seed=0):
    descales = {f"{x}_descale": torch.full((2, 2), 0.5) for x in "kv"}
    return {**draw(seed, E4M3), **descales, **{f"{x}_mean": torch.ones(2, WIDTH) for x in "kv"}}


def rotary(seed=0):
    """Cosines beside sines in one tensor, as vLLM has them."""
    both = torch.randn(64, ROTARY, generator=torch.Generator().manual_seed(seed))
    return {"rotary_cos": both[:, : ROTARY // 2], "rotary_sin": both[:, ROTARY // 2 :]}


def norms(dtype=torch.float32):
    return {f"{x}_norm_weight": torch.ones(WIDTH, dtype=dtype) for x in "qk"}


def packed(seed=0):
    given = draw(seed, rows=(2, 2))
    q, k, v = (given[name].flatten(0, 1)[:3] for name in "qkv")
    ends = {"cu_seqlens_q": int32([0, 1, 3]), "cu_seqlens_k_new": int32([0, 1, 3])}
    return {**given, "q": q, "k": k, "v": v, **ends, "max_seqlen_q": 2}


CACHES = ("k_cache", "v_cache")
CALLS = {
    "paged": draw,
    "dense": dense,
    "e4m3": e4m3,
    "rotary": lambda seed=0: {**draw(seed), **rotary(seed)},
    "rotary, e4m3": lambda seed=0: {**e4m3(seed), **rotary(seed), "rotary_interleaved": False},
    "rotary, positions": lambda seed=0: {
        **draw(seed),
        **rotary(seed),
        "rotary_seqlens": int32([7, 9]),
    },
    "packed": packed,
    "packed, rotary": lambda seed=0: {**packed(seed), **rotary(seed)},
    "norms": lambda seed=0: {**draw(seed), **norms()},
    "norms, rotary": lambda seed=0: {**e4m3(seed), **rotary(seed), **norms(torch.bfloat16)},
}
FIELDS = {name: struct["fields"] for name, struct in LAYOUT.items()}


def appended(parameters: bytes) -> dict[str, int]:
    """The addresses in AppendParams, by the name of the argument that belongs there."""
    whole, rows = FIELDS["AppendParams"], FIELDS["AppendedRows"]
    place, tables = FIELDS["PlaceParams"], FIELDS["RotaryParams"]
    size = LAYOUT["AppendedRows"]["size"]
    at = {"lengths": whole["lengths"][0]}
    for i, name in enumerate("qkv"):
        base = whole["rows"][0] + i * size
        at |= {name: base + rows["x"][0], f"{name}_cache": base + rows["out"][0]}
        at |= {
            f"{name}_{x}": base + rows[x][0]
            for x in ("mean", "descale", "cu_seqlens", "norm_weight")
        }
    names = ("cache_seqlens", "page_table", "kv_batch_idx")
    at |= {name: whole["place"][0] + place[name][0] for name in names}
    names = ("cos", "sin", "offsets")
    at |= {f"rotary_{name}": whole["rotary"][0] + tables[name][0] for name in names}
    return {name: int.from_bytes(parameters[i : i + 8], "little") for name, i in at.items()}


def address(parameters: bytes, field: str) -> int:
    if field == "seqused_k":
        at = FIELDS["DecodeParams"]["sequences"][0] + FIELDS["SequenceParams"][field][0]
    else:
        at = FIELDS["DecodeParams"][field][0]
    return int.from_bytes(parameters[at : at + 8], "little")


def run(given, **others):
    return flash_attn_with_kvcache(**{**given, **others})


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.parametrize("name", CALLS)
def test_a_step_is_one_launch(name, fake, misses):
    """A miss and a hit, and all that the kernel appends by is the call's own."""
    first, second = CALLS[name](0), CALLS[name](1)
    before = [second[x]._version for x in CACHES]
    run(first)
    run(second)
    assert misses == ["launch"]
    assert [launch.split()[0] for launch in fake.launches] == ["decode"] * 2
    shapes = [launch.partition(" first=")[0] for launch in fake.launches]
    assert shapes[0] == shapes[1]
    decode = fake.parameter(1)
    append = appended(decode[FIELDS["DecodeParams"]["append"][0] :])
    assert append.pop("lengths") == 0 and append.pop("q_cache") == second["q"].data_ptr()
    for field, found in append.items():
        argument = argument_of(field, name, second)
        assert found == (second[argument].data_ptr() if argument in second else 0), field
    assert address(decode, "seqused_k") == second["cache_seqlens"].data_ptr()
    assert address(decode, "q") == second["q"].data_ptr()
    assert [second[x]._version for x in CACHES] == [x + 1 for x in before]


def argument_of(field, name, given):
    """Whose address a field of AppendParams has."""
    known = {"kv_batch_idx": "cache_batch_idx", "q_cu_seqlens": "cu_seqlens_q"}
    known |= {f"{x}_cu_seqlens": "cu_seqlens_k_new" for x in "kv"}
    if field == "rotary_offsets" and "rotary" in name:
        return "rotary_seqlens" if "rotary_seqlens" in given else "cache_seqlens"
    return known.get(field, field)


#: What the decode kernel does not append itself.
AHEAD = {
    "many new rows": lambda: {**dense(), **{x: draw(rows=(2, 9))[x] for x in "kv"}},
    "e4m3 rows": lambda: {**e4m3(), **{x: draw()[x].to(E4M3) for x in "kv"}},
    "descales of pages": lambda: {**e4m3(), **{f"{x}_descale": torch.ones(9, 2, 1) for x in "kv"}},
    "fp16 rows": lambda: {**e4m3(), **{x: draw()[x].half() for x in "kv"}},
}


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.parametrize("name", AHEAD)
def test_others_are_two_launches(name, fake):
    run(AHEAD[name]())
    assert [launch.split()[0] for launch in fake.launches] == ["append", "decode"]


@pytest.fixture
def without(monkeypatch):
    """Makes kernels that append impossible to have, by an error. Gives the list of those tried."""
    monkeypatch.setattr(kernels, "_available", {})
    monkeypatch.setattr(kernels, "_VARIANTS", {})
    tried = []

    def lack(error):
        def kernel(variant):
            kernels._VARIANTS[variant.name] = variant
            if getattr(variant, "append", False):
                tried.append(variant.name)
                raise error
            return kernels.registry().get(variant.name)

        monkeypatch.setattr(kernels, "kernel", kernel)
        return tried

    return lack


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_a_kernel_that_cannot_be_had_is_done_without(without, fake):
    tried = without(MissingVariantError("decode"))
    run(draw())
    assert [launch.split()[0] for launch in fake.launches] == ["append", "decode"]
    assert tried and tried[0] not in [variant.name for variant in kernels.wanted()]


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_a_kernel_that_does_not_load_is_told_about_once(without, fake):
    tried = without(OSError(28, "No space left on device"))
    with pytest.warns(UserWarning, match="does without it: OSError: .*No space left"):
        run(draw())
    run({**draw(), "softmax_scale": 0.5})
    assert [launch.split()[0] for launch in fake.launches] == ["append", "decode"] * 2
    assert len(tried) == 1


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_a_capture_does_not_wait_for_the_check_of_what_it_can_do_without(monkeypatch, fake):
    checked = ("decode_bf16_d64_rows8", AppendVariant("bf16", "same").name)
    findings = dict.fromkeys((name, torch.device("cpu")) for name in checked)
    monkeypatch.setattr(trust, "_findings", findings)
    monkeypatch.setattr(trust, "is_captured", lambda device: True)
    monkeypatch.setattr(mode, "kernels_mode", lambda: "auto")
    run(draw())
    assert [launch.split()[0] for launch in fake.launches] == ["append", "decode"]


@pytest.mark.usefixtures("on_fake_driver", "unread", "ahead")
@pytest.mark.parametrize("name", CALLS)
def test_a_hit_launches_what_a_miss_does(name, fake, misses):
    first, second = CALLS[name](0), CALLS[name](1)
    run(first)
    run(second)
    assert misses == ["launch"]
    assert [launch.split()[0] for launch in fake.launches] == ["append", "decode"] * 2
    shapes = [launch.partition(" first=")[0] for launch in fake.launches]
    assert shapes[:2] == shapes[2:]
    append, decode = appended(fake.parameter(2)), fake.parameter(3)
    changes_q = "rotary" in name or "norms" in name
    for field, found in append.items():
        if field in ("lengths", "q_cache"):
            continue
        argument = argument_of(field, name, second)
        there = argument in second and (changes_q or field not in ("q", "q_cu_seqlens"))
        assert found == (second[argument].data_ptr() if there else 0), field
    assert append["lengths"] == address(decode, "seqused_k") != 0
    wanted = append["q_cache"] if changes_q else second["q"].data_ptr()
    assert address(decode, "q") == wanted != 0


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.parametrize("within", [True, False], ids=["one launch", "two launches"])
def test_a_hit_asks_torch_for_nothing_on_the_device(within, fake, misses, request):
    if not within:
        request.getfixturevalue("ahead")
    given = CALLS["rotary, e4m3"]()
    run(given)
    counts = {name: fake.count(name) for name in ("cuMemcpyDtoH_v2", "cuStreamSynchronize")}
    before = [given[name]._version for name in CACHES]
    fake.capture(True)
    run(given)
    fake.capture(False)
    assert len(misses) == 1
    assert {name: fake.count(name) for name in counts} == counts
    # Who saved a cache for a backward is told that it has been written.
    assert [given[name]._version for name in CACHES] == [x + 1 for x in before]


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_within_a_cache_are_refused_again(name, fake):
    given = draw()
    run(given)
    launches = len(fake.launches)
    within = given["v_cache"].flatten(0, 1)[: given[name].shape[-2] // 2 * 2]
    within = within.reshape(-1)[: given[name].numel()].view(given[name].shape)
    assert within.data_ptr() == given["v_cache"].data_ptr()
    with pytest.raises(ValueError, match=f"{name} must not share memory with v_cache"):
        run(given, **{name: within})
    assert len(fake.launches) == launches


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_caches_within_each_other_are_refused_again(fake, misses):
    """Those that are interlaced are not, wherever both lie."""
    given = draw()

    def interlaced():
        both = torch.zeros(9, 2, 16, 2, WIDTH).bfloat16()
        return {"k_cache": both[:, 0], "v_cache": both[:, 1]}

    run(given, **interlaced())
    run(given, **interlaced())
    assert len(misses) == 1
    both = torch.zeros(10, 2, 16, 2, WIDTH).bfloat16()
    with pytest.raises(ValueError, match="v_cache must not share memory with k_cache"):
        run(given, k_cache=both[:9, 0], v_cache=both[1:, 0])
    assert len(fake.launches) == 2


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.parametrize("name", ["q", "k", "v", "k_cache", "rotary_cos"])
def test_gradients_are_refused_again(name, fake):
    given = CALLS["rotary"]()
    run(given)
    launches = len(fake.launches)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        run(given, **{name: given[name].clone().requires_grad_()})
    assert len(fake.launches) == launches


#: What an append reads a copy of.
COPIED = {
    "int64 lengths": {"cache_seqlens": torch.tensor([50, 3])},
    "a length": {"cache_seqlens": 5},
    "a table with gaps": {"page_table": torch.zeros(2, 8, dtype=torch.int32)[:, ::2]},
    "rows with gaps": {"k": torch.zeros(2, 1, 2, 2 * WIDTH).bfloat16()[..., ::2]},
}


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
@pytest.mark.parametrize("name", COPIED)
def test_what_is_made_for_a_launch_is_made_for_each(name, misses):
    given = {**draw(), **COPIED[name]}
    for _ in range(2):
        run(given)
    assert len(misses) == 2 and len(decode_plans.cache()) == 0


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
@pytest.mark.parametrize("name", ["k", "v", "rotary_cos", "k_mean", "v_mean"])
def test_an_unaligned_tensor_is_a_miss(name, misses):
    given = CALLS["rotary, e4m3"]()
    run(given)
    x = given[name]
    size = x.untyped_storage().nbytes() // x.element_size()
    further = torch.zeros(size + 1).to(x.dtype)[1:]
    run(given, **{name: further.as_strided(x.shape, x.stride())})
    assert len(misses) == 2


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("name", ["rotary", "rotary, e4m3"])
def test_a_hit_computes_what_a_miss_does(name, on_simulated_device, misses):
    first, second = CALLS[name](0), CALLS[name](1)
    run(first)
    held = [second[x].clone() for x in CACHES]
    out = run(second)
    written = [second[x].clone() for x in CACHES]
    assert len(misses) == 1
    decode_plans.cache().clear()
    for x, before in zip(CACHES, held, strict=True):
        second[x].copy_(before)
    assert torch.equal(run(second), out) and len(misses) == 2
    for x, after, before in zip(CACHES, written, held, strict=True):
        assert torch.equal(second[x].view(torch.uint8), after.view(torch.uint8))
        assert not torch.equal(after.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_norms_are_of_the_call(misses):
    """Another eps is another call, and weights with gaps are copied for every launch."""
    given = {**draw(), **norms()}
    for _ in range(2):
        run(given)
        run(given, norm_eps=0.1)
    assert misses == ["launch"] * 2
    for _ in range(2):
        run(given, k_norm_weight=torch.ones(2 * WIDTH)[::2])
    assert misses == ["launch"] * 4
