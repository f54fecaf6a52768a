"""What the host makes of a forward call over pages: maps, boxes, and what it refuses."""

import random
import struct

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin, tma_boxes
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

BF16, SWIZZLE_128B = 9, 3
ADDRESS = {"q": 0x10000, "k": 0x20000, "v": 0x30000, "o": 0x40000}
#: KernelInfo.paged: no pages, pages, pages with left padding, pages that are gathered, and keys of
#: e4m3 that are widened.
DENSE, PAGES, PADDED, GATHERED, WIDENED = range(5)


def load(driver, paged=PAGES, block_n=128) -> _native.Kernel:
    q, keys = ((4, (64, rows, 1, 1), BF16, SWIZZLE_128B) for rows in (128, block_n))
    boxes = (q,) if paged in (GATHERED, WIDENED) else (q, keys, keys)
    cubin = fake_cubin(kBlockN=block_n, paged=paged, tma=tma_boxes(*boxes))
    return _native.Library(driver, cubin).kernel()


def paged_call(page_size=16, max_pages=40, pages=100) -> _native.ForwardParams:
    call = _native.ForwardParams()
    for name, rows, heads in (("q", 300, 8), ("o", 300, 8), *((x, page_size, 2) for x in "kv")):
        setattr(call, name, (ADDRESS[name], rows * heads * 128, heads * 128, 128))
    call.lse = (0x50000, 8 * 300, 300)
    call.heads_q, call.heads_kv = 8, 2
    call.head_dim = call.head_dim_v = 128
    sequences = call.sequences
    sequences.batch, sequences.batch_k = 2, 5
    sequences.max_seqlen_q, sequences.max_seqlen_k = 300, page_size * max_pages
    call.scores.window_left = call.scores.window_right = -1
    call.pages.page_table, call.pages.page_table_stride = 0x70000, max_pages
    call.pages.page_size, call.pages.num_pages, call.pages.max_pages = page_size, pages, max_pages
    return call


def field(fake, name: str, code: str):
    offset = LAYOUT["ForwardParams"]["fields"]["pages"][0]
    offset += LAYOUT["PageParams"]["fields"][name][0]
    return struct.unpack_from(f"<{code}", fake.parameter(len(fake.launches) - 1), offset)[0]


def test_pages_are_the_batch_of_the_maps(fake, driver):
    _native.launch_forward(load(driver), 0, 0, paged_call())
    for at, name in ((1, "k"), (2, "v")):
        words = struct.unpack_from("<7Q", fake.parameter(0), 128 * at)
        assert words[:4] == (BF16, 4, ADDRESS[name], SWIZZLE_128B)
        assert words[5:] == (100, 16 * 2 * 128 * 2)  # pages, and bytes from one to the next
    assert field(fake, "page_table", "Q") == 0x70000


@pytest.mark.parametrize(
    ("page_size", "block_n", "box"),
    [
        *((8, 128, 8), (16, 128, 16), (128, 128, 128), (256, 128, 128), (176, 128, 16)),
        *((48, 96, 48), (64, 224, 32), (224, 224, 224), (16, 80, 16)),
    ],
)
def test_boxes_that_no_page_boundary_cuts(fake, driver, page_size, block_n, box):
    _native.launch_forward(load(driver, block_n=block_n), 0, 0, paged_call(page_size))
    assert field(fake, "box_rows", "i") == box


def test_division_by_the_page_size_is_exact(fake, driver):
    kernel, numbers = load(driver), random.Random(1)
    for size in (8, 16, 24, 176, 528, 65544, 2**30 - 8):
        _native.launch_forward(kernel, 0, 0, paged_call(size, 1, 1))
        factor, shift = field(fake, "page_multiplier", "I"), field(fake, "page_shift", "i")
        for n in (0, size - 1, size, 2**31 - 1, *(numbers.randrange(2**31) for _ in range(2000))):
            assert n * factor >> shift == n // size, (n, size)


def changed(**values) -> _native.ForwardParams:
    call = paged_call()
    for name, value in values.items():
        if hasattr(call, name):
            setattr(call, name, value)
            continue
        setattr(call.pages if hasattr(call.pages, name) else call.sequences, name, value)
    return call


REFUSED = {
    "a kernel without pages": (DENSE, changed(), "this kernel reads no pages, and page_table is"),
    "no table": (PAGES, changed(page_table=0), "this kernel reads pages, and page_table is null"),
    "packed keys": (PAGES, changed(cu_seqlens_k=16), "cu_seqlens_k is given with a page_table"),
    "padding": (PAGES, changed(leftpad_k=16), "this kernel reads pages without left padding"),
    "size": (PAGES, changed(page_size=12), "page_size is 12; it must be a positive multiple of 8"),
    "no rows": (PAGES, changed(page_size=0), "page_size is 0"),
    "no page": (PAGES, changed(num_pages=0), "num_pages is 0 and max_pages 40; there must be a"),
    "columns": (PAGES, changed(max_pages=-1), "max_pages -1"),
    "gathered, no rows": (GATHERED, changed(page_size=0), "page_size is 0; it must be a positive"),
    "gathered, address": (GATHERED, changed(k=(0x20008, 4096, 256, 128)), "k is at address 131080"),
    "gathered, page": (
        GATHERED,
        changed(v=(0x30000, 4100, 256, 128)),
        "row of v has 4100 elements",
    ),
    "gathered, row": (GATHERED, changed(k=(0x20000, 4096, 260, 128)), "row of k has 260 elements"),
    "gathered, head": (GATHERED, changed(v=(0x30000, 4096, 256, 124)), "row of v has 124 elements"),
    "gathered, width": (GATHERED, changed(head_dim=124), "row of k has 124 elements; this kernel"),
    "widened, rows of 24 bytes": (
        WIDENED,
        changed(k=(0x20000, 4096, 264, 128)),
        "row of k has 264 elements; this kernel reads pages by 16 bytes",
    ),
    "widened, address": (WIDENED, changed(v=(0x30008, 4096, 256, 128)), "v is at address 196616"),
    "widened, no rows": (WIDENED, changed(page_size=0), "page_size is 0; it must be a positive"),
    "widened, q's descale": (WIDENED, changed(q_descale=(16, 0, 0, 0)), "q_descale is given"),
    "widened, blocks": (
        WIDENED,
        changed(k_descale=(16, 2, 1, 1)),
        "one descale of k and v per head",
    ),
    "widened, a mean": (WIDENED, changed(v_mean=(16, 0, 0)), "k_mean, v_mean or v_channel_descale"),
    "room": (PAGES, changed(max_seqlen_k=641), "max_seqlen_k is 641; the pages of a sequence hold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, name):
    paged, call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        _native.launch_forward(load(driver, paged), 0, 0, call)
    assert fake.launches == []


def test_a_kernel_for_padding_takes_calls_with_and_without(fake, driver):
    for call in (changed(leftpad_k=16), changed()):
        _native.launch_forward(load(driver, PADDED), 0, 0, call)
    assert len(fake.launches) == 2


@pytest.mark.parametrize("page_size", [1, 3, 8, 17])
def test_gathered_pages_have_any_size_and_no_maps(fake, driver, page_size):
    call = paged_call(page_size)
    call.sequences.leftpad_k = 16
    _native.launch_forward(load(driver, GATHERED), 0, 0, call)
    assert fake.parameter(0)[128:384] == bytes(256)
    factor, shift = field(fake, "page_multiplier", "I"), field(fake, "page_shift", "i")
    assert all(n * factor >> shift == n // page_size for n in (0, 7, 2**31 - 1))


@pytest.mark.parametrize("page_size", [1, 16, 17])
def test_widened_keys_lie_in_pages_of_any_size(fake, driver, page_size):
    call = paged_call(page_size)
    call.sequences.leftpad_k = 16
    _native.launch_forward(load(driver, WIDENED), 0, 0, call)
    assert fake.parameter(0)[128:384] == bytes(256)
    assert field(fake, "num_pages", "i") == 100


@pytest.mark.parametrize(("cu_seqlens_k", "pages"), [(0, 5), (16, 1)])
def test_a_sequence_is_a_page_where_there_are_none(fake, driver, cu_seqlens_k, pages):
    call = changed(page_table=0, page_size=0, num_pages=0, max_pages=0)
    call.sequences.cu_seqlens_k, call.sequences.total_k = cu_seqlens_k, 1000
    _native.launch_forward(load(driver, WIDENED), 0, 0, call)
    assert field(fake, "page_table", "Q") == 0
    assert field(fake, "num_pages", "i") == pages


@pytest.mark.parametrize("cu_seqlens_k", [0, 16])
def test_widened_keys_of_an_empty_cache_have_no_address(fake, driver, cu_seqlens_k):
    """As torch gives none to a tensor without elements. The kernel writes zeros."""
    nowhere = (0, 0, 256, 128)
    call = changed(k=nowhere, v=nowhere, page_table=0, page_size=0, num_pages=0, max_pages=0)
    call.sequences.cu_seqlens_k, call.sequences.max_seqlen_k = cu_seqlens_k, 0
    _native.launch_forward(load(driver, WIDENED), 0, 0, call)
    assert len(fake.launches) == 1
