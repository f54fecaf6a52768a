"""`get_scheduler_metadata` on a GPU: one launch into a tensor whose shape follows from the batch,
for calls that take it by their plans."""

import pytest
import torch

import flash8
from fake_driver.cubin import LAYOUT
from flash8.call.checks import NO_SPLIT
from flash8.compat import fa3_raw, vllm_flash_attn
from flash8.compat import flash_attn_interface as fa3
from flash8.ops import decode_plans
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

HEADS, HEADS_KV, WIDTH, PAGE = 8, 2, 128, 16
SIZES = (2, 2, 64, HEADS, HEADS_KV, WIDTH)
SPLIT_KEYS = LAYOUT["DecodeParams"]["fields"]["split_keys"]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    return {
        "q": tensor(2, 2, HEADS, WIDTH),
        "k_cache": tensor(9, PAGE, HEADS_KV, WIDTH),
        "v_cache": tensor(9, PAGE, HEADS_KV, WIDTH),
        "page_table": torch.randperm(9, generator=generator)[:8].view(2, 4).int(),
        "cache_seqlens": int32([60 - seed, 3]),
    }


def metadata_of(given, **options):
    sizes = {"page_size": PAGE, **options}
    return flash8.get_scheduler_metadata(*SIZES, given["cache_seqlens"], **sizes)


def run(given, **others):
    return flash8.flash_attn_with_kvcache(**{**given, **others})


def field(parameters, struct, name):
    at, size = LAYOUT[struct]["fields"][name]
    return int.from_bytes(parameters[at : at + size], "little")


def of_call(parameters):
    """The address that a decode kernel is given."""
    return field(parameters, "DecodeParams", "scheduler_metadata")


def test_it_is_one_launch_whatever_the_lengths(fake, on_fake_driver):
    given = draw()
    first = metadata_of(given)
    given["cache_seqlens"].fill_(7)
    second = metadata_of(given, out=first)
    assert first.shape == (3,) and first.dtype == torch.int32 and second is first
    assert len(fake.launches) == 2 and fake.launches[0] == fake.launches[1]
    (parameters, again) = (fake.parameter(i) for i in range(2))
    assert parameters == again
    assert field(parameters, "ScheduleParams", "scheduler_metadata") == first.data_ptr()
    assert field(parameters, "ScheduleParams", "block_m") == 8
    assert field(parameters, "ScheduleParams", "element_bytes") == 2


def test_all_layers_take_one(fake, on_fake_driver, misses):
    """Hits, but for the first; the address is that of each call."""
    given = draw()
    metadata = metadata_of(given)
    for _ in range(4):
        run(given, scheduler_metadata=metadata)
    other = metadata.clone()
    run(given, scheduler_metadata=other)
    assert misses == ["launch"] and len(fake.launches) == 6
    addresses = [of_call(fake.parameter(i)) for i in range(1, 6)]
    assert addresses == [metadata.data_ptr()] * 4 + [other.data_ptr()]
    run(given)
    assert len(misses) == 2 and of_call(fake.parameter(6)) == 0


def test_one_split_is_planned_as_one(fake, on_fake_driver, misses):
    """What a call with num_splits=1 numbers are sequences, by a kernel for their heads."""
    given = draw()
    metadata = metadata_of(given, num_splits=1)
    for _ in range(2):
        run(given, scheduler_metadata=metadata, num_splits=1)
    run(given)
    places = [LAYOUT["ScheduleParams"]["fields"]["call"][0], 0, 0, 0]
    fields = [
        int.from_bytes(fake.parameter(i)[at + SPLIT_KEYS[0] :][: SPLIT_KEYS[1]], "little")
        for i, at in enumerate(places)
    ]
    assert fields == [NO_SPLIT] * 3 + [0]
    assert misses == ["launch", "launch"]


def test_the_raw_op_takes_it(fake, on_fake_driver, misses):
    """`torch.ops.flash_attn_3.fwd` and `_flash_attn_forward` without new keys, too."""
    given = draw()
    metadata = metadata_of(given)
    cache = [given[x] for x in ("q", "k_cache", "v_cache")]
    lengths = {"seqused_k": given["cache_seqlens"], "page_table": given["page_table"]}
    for _ in range(2):
        out, lse, *partials = fa3_raw._flash_attn_forward(
            *cache, **lengths, scheduler_metadata=metadata, num_splits=32
        )
    assert out.shape == cache[0].shape and lse.shape == (2, HEADS, 2)
    assert all(x.numel() == 0 for x in partials) and misses == ["launch"]
    assert [of_call(fake.parameter(i)) for i in (1, 2)] == [metadata.data_ptr()] * 2


def test_part_of_a_larger_buffer(fake, on_fake_driver, misses):
    """As vLLM keeps it for its graphs: one word for each sequence and one more."""
    given = draw()
    buffer = torch.zeros(max(SIZES[0], 64) + 1, dtype=torch.int32)
    metadata = metadata_of(given)
    buffer[: metadata.shape[0]] = metadata
    for _ in range(2):
        run(given, scheduler_metadata=buffer[: metadata.shape[0]])
    assert misses == ["launch"]
    assert of_call(fake.parameter(2)) == buffer.data_ptr()


def packed(given):
    return {
        "q": given["q"].flatten(0, 1),
        "cu_seqlens_q": int32([0, 2, 4]),
        "max_seqlen_q": 2,
        "seqused_k": given["cache_seqlens"],
    }


def test_vllm_s_varlen_call_takes_it(fake, on_fake_driver, misses):
    given = draw()
    call = packed(given)
    metadata = vllm_flash_attn.get_scheduler_metadata(
        *SIZES, given["cache_seqlens"], cu_seqlens_q=call["cu_seqlens_q"], page_size=PAGE
    )
    pages = {"k": given["k_cache"], "v": given["v_cache"], "block_table": given["page_table"]}
    for function in (vllm_flash_attn.flash_attn_varlen_func, fa3.flash_attn_varlen_func):
        for _ in range(2):
            function(
                **call,
                **pages,
                cu_seqlens_k=None,
                max_seqlen_k=64,
                scheduler_metadata=metadata,
                num_splits=0,
            )
    assert misses == ["launch"]
    assert [of_call(fake.parameter(i)) for i in range(1, 5)] == [metadata.data_ptr()] * 4


def test_a_bound_of_splits_is_no_reason_to_do_without_the_kernel(fake, on_fake_driver, misses):
    """vLLM gives one with its graphs."""
    given = draw()
    call = packed(given)
    pages = {"k": given["k_cache"], "v": given["v_cache"], "block_table": given["page_table"]}
    metadata = metadata_of(given, num_splits=32)
    for _ in range(2):
        *_, out_partial, lse_partial = run(
            given, scheduler_metadata=metadata, num_splits=32, return_softmax_lse=True
        )
        vllm_flash_attn.flash_attn_varlen_func(
            **call, **pages, max_seqlen_k=64, scheduler_metadata=metadata, num_splits=32
        )
    assert out_partial.numel() == lse_partial.numel() == 0
    assert misses == ["launch", "launch"]
    addresses = [of_call(fake.parameter(i)) for i in range(1, 5)]
    assert addresses == [metadata.data_ptr()] * 4


def test_a_call_of_many_rows_takes_no_notice(fake, on_fake_driver, misses):
    """It is the forward kernel's, and has a plan all the same."""
    given = draw()
    given["q"] = torch.zeros(2, 40, HEADS, WIDTH).bfloat16()
    metadata = flash8.get_scheduler_metadata(2, 40, *SIZES[2:], given["cache_seqlens"])
    for _ in range(3):
        run(given, scheduler_metadata=metadata)
    assert misses == ["launch"]


def test_a_captured_call_takes_it(fake, on_fake_driver):
    given = draw()
    metadata = metadata_of(given)
    run(given, scheduler_metadata=metadata)
    fake.capture(True)
    metadata_of(given, out=metadata)
    run(given, scheduler_metadata=metadata)
    fake.capture(False)
    assert len(fake.launches) == 4
    assert of_call(fake.parameter(3)) == metadata.data_ptr()


NEW = {"cu_seqlens_k_new": int32([0, 1, 3])}


@pytest.mark.parametrize(
    "options,word,value",
    [
        ({}, "seqlen_k_new", 0),
        ({"max_seqlen_k_new": 3}, "seqlen_k_new", 3),
        ({"max_seqlen_k_new": 3, **NEW}, "seqlen_k_new", 0),
        ({"max_seqlen_k_new": 3, **NEW}, "cu_seqlens_k_new", NEW["cu_seqlens_k_new"].data_ptr()),
        ({"qkv_dtype": torch.float8_e4m3fn}, "element_bytes", 1),
        ({"headdim_v": 64}, "tile_head_dim_v", 128),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # an address is another every time
)
def test_arguments(options, word, value, fake, on_fake_driver):
    metadata_of(draw(), **options)
    assert field(fake.parameter(0), "ScheduleParams", word) == value


@pytest.mark.parametrize(
    "sizes,width,words",
    [
        ((2, 1, 64, 128, 1, 64), 512, {"block_m": 32, "qv": 1, "tile_head_dim": 64}),
        ((2, 1, 64, 16, 1, 80), None, {"block_m": 16, "qv": 0, "tile_head_dim": 96}),
        ((2, 3, 64, 64, 1, 256), None, {"block_m": 16, "tile_head_dim_v": 256}),
    ],
)
def test_tiles_are_those_of_the_call(sizes, width, words, fake, on_fake_driver):
    flash8.get_scheduler_metadata(*sizes, int32([60, 3]), headdim_v=width)
    assert {x: field(fake.parameter(0), "ScheduleParams", x) for x in words} == words


@pytest.mark.parametrize(
    "sizes,dtype",
    [((2, 300, 64, HEADS, HEADS_KV, 128), torch.bfloat16), (SIZES, torch.float32)],
)
def test_sizes_that_no_decode_kernel_serves_launch_nothing(sizes, dtype, fake, on_fake_driver):
    out = torch.ones(3, dtype=torch.int32)
    flash8.get_scheduler_metadata(*sizes, int32([60, 3]), dtype, out=out)
    assert not fake.launches and not out.any()


BAD = {
    "too short": (lambda x: x[:2], ValueError, r"\(3,\)"),
    "too long": (lambda x: torch.zeros(4, dtype=torch.int32), ValueError, r"\(3,\)"),
    "of int64": (lambda x: x.long(), TypeError, "int32"),
    "with gaps": (lambda x: torch.zeros(6, dtype=torch.int32)[::2], ValueError, "contiguous"),
    "no tensor": (lambda x: x.tolist(), TypeError, "Tensor"),
    "elsewhere": (lambda x: x.to("meta"), ValueError, "meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_metadata_is_refused_before_a_launch(name, fake, on_fake_driver):
    change, error, text = BAD[name]
    given = draw()
    metadata = metadata_of(given)
    wrong = change(metadata)
    with pytest.raises(error, match=f"scheduler_metadata.*{text}"):
        run(given, scheduler_metadata=wrong)
    with pytest.raises(error, match=f"out.*{text}"):
        metadata_of(given, out=wrong)
    assert len(fake.launches) == 1


def test_an_output_over_the_lengths_is_refused(fake, on_fake_driver):
    given = draw()
    both = torch.zeros(3, dtype=torch.int32)
    given["cache_seqlens"] = both[:2]
    with pytest.raises(ValueError, match="out must not share memory"):
        metadata_of(given, out=both)
    assert not fake.launches


def test_an_output_that_is_written_counts_as_changed(fake, on_fake_driver):
    given = draw()
    out = metadata_of(given)
    version = out._version
    metadata_of(given, out=out)
    assert out._version > version


def test_it_is_compiled_without_a_break(fake, on_fake_driver):
    """What is compiled launches nothing: zeros, with which decode kernels count for themselves."""
    made = torch.compile(metadata_of, fullgraph=True, backend="eager")
    given = {"cache_seqlens": draw()["cache_seqlens"]}
    out = torch.ones(3, dtype=torch.int32)
    assert not made(given).any()
    assert made(given, out=out) is out
    assert not out.any() and not fake.launches


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_results_are_those_without_it(on_simulated_device, misses):
    """Hits and misses; refreshed in place for other lengths, and stale."""
    first, second = draw(0), draw(1)
    wanted = [run(x, return_softmax_lse=True)[:2] for x in (first, second)]
    decode_plans.cache().clear()
    misses.clear()
    metadata = metadata_of(first)
    assert metadata.tolist() == [1 << 16 | 8 << 8 | 32, 4, 6]
    for refreshed in (True, False):
        for given, want in zip((first, second), wanted, strict=True):
            if refreshed:
                metadata_of(given, out=metadata)
            found = run(given, return_softmax_lse=True, scheduler_metadata=metadata)[:2]
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    assert misses == ["launch"]
