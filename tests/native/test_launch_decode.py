"""What the host makes of a decode call: parameters, tensor maps, grid, and what it refuses."""

import random
import struct

import pytest

from fake_driver.cubin import LAYOUT, decode_cubin, fake_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

TMA, GATHER = "decode_bf16_e4m3_d128_rows8", "decode_bf16_e4m3_d128_rows8_gather"
ADDRESS = {"q": 0x10000, "k": 0x20000, "v": 0x30000, "o": 0x40000}
MARGIN = 1


def load(driver, name=TMA):
    return _native.Library(driver, decode_cubin(name)).kernel()


@pytest.fixture
def kernel(driver):
    return load(driver)


def dense_call(batch=3, rows=2, keys=500, heads=8, heads_kv=2, head_dim=128):
    call = _native.DecodeParams()
    for name, n, count in (("q", rows, heads), ("o", rows, heads), ("k", keys, heads_kv)):
        setattr(call, name, (ADDRESS[name], n * count * head_dim, count * head_dim, head_dim))
    call.v = (ADDRESS["v"], *call.k[1:])
    call.heads_q, call.heads_kv = heads, heads_kv
    call.head_dim = call.head_dim_v = head_dim
    call.pages.num_pages, call.pages.page_size = batch, keys
    call.sequences.batch = call.sequences.batch_k = batch
    call.sequences.max_seqlen_q, call.sequences.max_seqlen_k = rows, keys
    call.scores.softmax_scale = 0.125
    call.partials, call.tickets = 0x500000, 0x600000
    return call


def paged_call(page_size=16, max_pages=40, pages=100, **sizes):
    call = dense_call(**sizes)
    row = call.heads_kv * call.head_dim
    call.k = (ADDRESS["k"], page_size * row, row, call.head_dim)
    call.v = (ADDRESS["v"], *call.k[1:])
    call.pages.num_pages, call.pages.page_size = pages, page_size
    call.pages.page_table, call.pages.page_table_stride, call.pages.max_pages = (
        0x700000,
        max_pages,
        max_pages,
    )
    call.sequences.max_seqlen_k = page_size * max_pages
    return call


def field(fake, name: str, code: str):
    fields, pages = (LAYOUT[kind]["fields"] for kind in ("DecodeParams", "PageParams"))
    offset = fields["pages"][0] + pages[name][0] if name in pages else fields[name][0]
    return struct.unpack_from(f"<{code}", fake.parameter(len(fake.launches) - 1), offset)[0]


def grid(fake) -> int:
    return int(fake.launches[-1].split()[2].removeprefix("grid=").split(",")[0])


def test_a_dense_call(fake, kernel):
    """Eight tiles of a unit at least are a CTA's."""
    _native.launch_decode(kernel, 0, 99, dense_call())
    assert fake.launches[-1].startswith("decode device=0 grid=")
    assert grid(fake) == -(-3 * 2 * 1 * 8 // 8)
    assert field(fake, "box_rows", "i") == 64
    for at, name in enumerate("kv"):
        words = struct.unpack_from("<7Q", fake.parameter(0), 128 * at)
        assert words[:4] == (0, 4, ADDRESS[name], 3)
        assert words[5:] == (3, 500 * 2 * 128)  # pages, and bytes from one to the next


@pytest.mark.parametrize(
    "page_size, box", [(8, 8), (24, 8), (16, 16), (64, 64), (96, 32), (528, 16)]
)
def test_boxes_that_no_page_boundary_cuts(fake, kernel, page_size, box):
    _native.launch_decode(kernel, 0, 0, paged_call(page_size))
    assert field(fake, "box_rows", "i") == box


def test_pages_of_any_size_are_gathered(fake, driver, kernel):
    with pytest.raises(ValueError, match="page_size is 12; this kernel loads pages of a multiple"):
        _native.launch_decode(kernel, 0, 0, paged_call(12))
    _native.launch_decode(load(driver, GATHER), 0, 0, paged_call(12))
    assert field(fake, "tma_k", "q") == 0


def test_division_by_the_page_size_is_exact(fake, driver):
    gather, numbers = load(driver, GATHER), random.Random(1)
    for size in (1, 2, 3, 5, 7, 16, 24, 127, 128, 528, 65537, 2**30 - 1, 2**31 - 1):
        call = paged_call(1, 1, 1)
        call.pages.page_size, call.sequences.max_seqlen_k = size, 1
        call.k = call.v = (ADDRESS["k"], 0, 0, 128)
        _native.launch_decode(gather, 0, 0, call)
        factor, shift = field(fake, "page_multiplier", "I"), field(fake, "page_shift", "i")
        positions = [0, 1, size - 1, size, 2 * size - 1, 2**31 - 1]
        positions += [numbers.randrange(2**31) for _ in range(2000)]
        positions += [n // size * size - d for n in positions for d in (0, 1) if n >= size]
        for n in (n for n in positions if 0 <= n < 2**31):
            assert n * factor >> shift == n // size, (n, size)


def test_the_workspace_depends_on_the_grid_alone(fake, driver, kernel):
    many = driver.devices()[0].multiprocessors
    for batch, keys in ((1000, 2000), (7000, 5)):
        call = dense_call(batch=batch, keys=keys)
        sizes = _native.decode_workspace(kernel, 0, call, MARGIN)
        assert sizes == {
            "partials": 4 * 2 * (many - MARGIN) * 8 * 130,
            "tickets": 4 * (many - MARGIN),
        }
        _native.launch_decode(kernel, 0, 0, call, MARGIN)
        assert grid(fake) == many - MARGIN


def test_nothing_to_do_is_no_launch(fake, kernel):
    _native.launch_decode(kernel, 0, 0, dense_call(rows=0))
    _native.launch_decode(kernel, 0, 0, changed(dense_call(), batch=0))
    _native.launch_decode(kernel, 0, 0, changed(dense_call(), cu_seqlens_q=16, total_q=0))
    assert not fake.launches
    _native.launch_decode(kernel, 0, 0, dense_call(keys=1))
    call = dense_call(keys=1)
    call.sequences.max_seqlen_k = 0  # O and LSE have to be written
    _native.launch_decode(kernel, 0, 0, call)
    assert len(fake.launches) == 2 and grid(fake) == 1


def changed(call, **fields):
    for name, value in fields.items():
        part = next(part for part in (call, call.pages, call.sequences) if hasattr(part, name))
        setattr(part, name, value)
    return call


REFUSED = {
    "heads": (changed(dense_call(), heads_q=5), "heads_q is 5; it must be a multiple of heads_kv"),
    "head_dim": (changed(dense_call(), head_dim=136), "head_dim is 136; this kernel supports"),
    "rows of a cache": (
        changed(dense_call(), head_dim=40),
        "head_dim is 40 and head_dim_v 128; this kernel takes multiples of 16",
    ),
    "page_size": (changed(dense_call(), page_size=0), "page_size is 0; it must be positive"),
    "pages": (changed(dense_call(), num_pages=-1), "num_pages is -1; it must be positive"),
    "no pages": (changed(paged_call(), num_pages=0), "num_pages is 0; it must be positive"),
    "columns": (changed(paged_call(), max_pages=-1), "max_pages is -1; it must not be negative"),
    "packed": (changed(dense_call(), cu_seqlens_k=16), "cu_seqlens_k is given"),
    "room": (
        changed(paged_call(), max_seqlen_k=641),
        "max_seqlen_k is 641; the pages of a sequence",
    ),
    "rows": (changed(dense_call(), max_seqlen_q=2**31 - 600), "rows and k 500; supported"),
    "tiles": (dense_call(batch=2**20, keys=2**20), "more than 2.30 tiles of keys"),
    "address": (changed(dense_call(), k=(24, 16, 16, 16)), "k is at address 24; it must be"),
    "stride": (changed(dense_call(), v=(16, 24, 16, 16)), "a stride of v is 24 elements"),
    "o": (changed(dense_call(), o=(8, 16, 16, 16)), "o is at address 8; it must be a multiple"),
    "blocks": (changed(dense_call(), k_descale=(16, 0, 0, 1)), "per tensor or per head"),
    "descales of keys": (
        changed(dense_call(), v_scale_rows=1, v_descale=(16, 0, 0, 1)),
        "this kernel takes no v_descale by place",
    ),
    "wide queries' descale": (
        changed(dense_call(), q_descale=(16, 0, 0, 0)),
        "q_descale is given with a q of 16 bits",
    ),
    "queries' descale": (
        changed(dense_call(), q_is_e4m3=1, q_descale=(16, 0, 1, 0), heads_per_q_descale=3),
        "3 of 8 query heads share a q_descale",
    ),
    "a tree": (
        changed(dense_call(rows=33), tree_mask=16),
        "tree_mask is given with 33 rows of q; a word has 32 bits",
    ),
    "splits": (changed(dense_call(), split_keys=96), "split_keys is 96; it must be a multiple"),
    "partials": (changed(dense_call(), partials=8), "partials is at address 8; it must be"),
    "tickets": (changed(dense_call(), tickets=0), "tickets is null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(fake, kernel, name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"decode: .*{words}"):
        _native.launch_decode(kernel, 0, 0, call)
    assert not fake.launches


def test_a_gathered_cache_spans_what_32_bits_count(fake, driver):
    """In units of 16 bytes."""
    call = changed(paged_call(12), k=(16, 2**37, 16, 16))
    with pytest.raises(ValueError, match=r"decode: k spans more than 2\^36 bytes"):
        _native.launch_decode(load(driver, GATHER), 0, 0, call)
    assert not fake.launches


REFUSED_BY_OTHERS = {
    "16-bit keys": (
        "decode_bf16_d128_rows8",
        changed(dense_call(), q_is_e4m3=1),
        "q is e4m3; this kernel takes q of 16 bits",
    ),
    "no descale of keys": (
        "decode_bf16_e4m3_d128_rows8_keyscales",
        changed(dense_call(), k_scale_rows=1),
        "k_descale by place is null",
    ),
    "rows of descales": (
        "decode_bf16_e4m3_d128_rows8_keyscales",
        changed(dense_call(), k_scale_rows=24, k_descale=(16, 0, 0, 1)),
        "24 rows share a k_descale; it must be a power of two",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_OTHERS)
def test_what_another_kernel_refuses(fake, driver, name):
    variant, call, words = REFUSED_BY_OTHERS[name]
    with pytest.raises(ValueError, match=f"decode: {words}"):
        _native.launch_decode(load(driver, variant), 0, 0, call)
    assert not fake.launches


def test_every_split_has_a_place(fake, driver, kernel):
    """Of as many as there is room for, rounded up to a power of two; a CTA may have one."""
    call = changed(dense_call(batch=5, keys=1000), split_keys=128)
    sizes = _native.decode_workspace(kernel, 0, call, MARGIN)
    assert sizes == {"partials": 4 * 128 * 8 * 130, "tickets": 4 * 5 * 2 * 8}
    _native.launch_decode(kernel, 0, 0, call, MARGIN)
    assert grid(fake) == 5 * 2 * 8
    many = driver.devices()[0].multiprocessors
    call = changed(dense_call(batch=500, keys=1000), split_keys=128)
    _native.launch_decode(kernel, 0, 0, call, MARGIN)
    assert grid(fake) == many - MARGIN


def test_other_kernels_are_refused(fake, driver):
    forward = _native.Library(driver, fake_cubin()).kernel()
    with pytest.raises(ValueError, match="forward is not a decode kernel"):
        _native.launch_decode(forward, 0, 0, dense_call())
    with pytest.raises(ValueError, match="sm_margin is -1; it must not be negative"):
        _native.launch_decode(load(driver), 0, 0, dense_call(), -1)


APPENDING = "decode_bf16_d128_rows8_append"
NEW = {"k": 0x800000, "v": 0x900000}


def appending_call(new=1, **sizes):
    call = dense_call(**sizes)
    call.sequences.seqused_k = 0xA00000
    for name, address in NEW.items():
        rows = getattr(call.append, name)
        rows.x = (address, new * 2 * 128, 2 * 128, 128)
        rows.tokens, rows.seqlen = call.sequences.batch * new, new
    return call


def launch_appending(driver, call):
    _native.launch_decode(load(driver, APPENDING), 0, 0, call, MARGIN)


def test_the_append_is_as_attention_has_it(driver, fake):
    """Where new rows go, and what Q is, is filled in."""
    launch_appending(driver, appending_call())
    at = LAYOUT["DecodeParams"]["fields"]["append"][0]
    append = fake.parameter(0)[at : at + LAYOUT["AppendParams"]["size"]]
    whole, rows = LAYOUT["AppendParams"]["fields"], LAYOUT["AppendedRows"]

    def word(offset, code="Q"):
        return struct.unpack_from(f"<{code}", append, offset)[0]

    for i, name in enumerate("qkv"):
        base = whole["rows"][0] + i * rows["size"]
        out = word(base + rows["fields"]["out"][0])
        assert out == ADDRESS[name]
        assert word(base + rows["fields"]["x"][0]) == NEW.get(name, ADDRESS["q"])
        assert word(base + rows["fields"]["heads"][0], "i") == (8 if name == "q" else 2)
        assert word(base + rows["fields"]["head_dim"][0], "i") == 128
    place = LAYOUT["PlaceParams"]["fields"]
    assert word(whole["place"][0] + place["cache_seqlens"][0]) == 0xA00000
    assert word(whole["place"][0] + place["num_slots"][0], "i") == 3
    assert word(whole["place"][0] + place["slot_tokens"][0], "i") == 500


WRONG_APPENDS = {
    "appends new keys, which are null": lambda call: setattr(call.append.k, "x", (0, 0, 0, 0)),
    "x of v is at address": lambda call: setattr(call.append.v, "x", (0, 0, 0, 0)),
    "3 new rows of k and 2 of v": lambda call: setattr(call.append.v, "tokens", 2),
    "in 3 dense sequences of 2": lambda call: (
        setattr(call.append.k, "seqlen", 2),
        setattr(call.append.v, "seqlen", 2),
    ),
    "cache_seqlens is null": lambda call: setattr(call.sequences, "seqused_k", 0),
    "rows that rotate need a table": lambda call: setattr(call.append.k, "rotates", 1),
    "there is no row of q": lambda call: setattr(call.sequences, "max_seqlen_q", 0),
}


@pytest.mark.parametrize("reason", WRONG_APPENDS)
def test_appends_that_are_refused(reason, driver, fake):
    call = appending_call()
    WRONG_APPENDS[reason](call)
    with pytest.raises(ValueError, match=reason):
        launch_appending(driver, call)
    assert not fake.launches


def test_most_sequences_of_an_append(driver, fake):
    """Of new keys 2^30 eights of channels are counted, and rows of q in 32 bits."""
    many = 1 << 22
    launch_appending(driver, appending_call(batch=many, keys=32))
    assert len(fake.launches) == 1
    with pytest.raises(ValueError, match=r"2\^30 eights of channels of new keys"):
        launch_appending(driver, appending_call(9, batch=many, keys=32))
    with pytest.raises(ValueError, match="q has 2147483648 rows"):
        launch_appending(
            driver, appending_call(rows=16, heads=1, heads_kv=1, batch=1 << 27, keys=32)
        )
    assert len(fake.launches) == 1


def test_a_kernel_that_does_not_append_takes_no_new_keys(driver, fake):
    with pytest.raises(ValueError, match="appends no new keys, which are given"):
        _native.launch_decode(load(driver), 0, 0, appending_call(), MARGIN)
    assert not fake.launches
