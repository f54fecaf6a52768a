"""The appending kernel on the simulated device against the portable append, bit by bit."""

import pytest
import torch

from append_cases import WIDTH, assert_same, bits, differs, make
from cases import int32
from flash8.backends.hopper import append as hopper
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.tensors.float8 import E4M3
from quantizer_cases import draw
from quantizer_device import device
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: Types of new rows and of the caches that they go to.
KINDS = {
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "bf16 to e4m3": (BF16, E4M3),
    "fp16 to e4m3": (FP16, E4M3),
    "e4m3": (E4M3, E4M3),
}
PAGES = [None, 1, 3, 16, 64]
ROTARY = {
    "none": {},
    "neighbours": {"rotary_dim": 72 // 16 * 16},
    "halves": {"rotary_dim": 32, "interleaved": False},
    "halves of an odd number of groups": {"rotary_dim": 48, "interleaved": False},
    "part, tables of x's type": {"rotary_dim": 16, "table_dtype": None},
    "halves, tables of x's type": {"rotary_dim": 16, "interleaved": False, "table_dtype": None},
}


def check(monkeypatch, call, *, launches=1, seed=0):
    """Kernels and portable code leave the same, and not what was there."""
    before = [x.cache.clone() for x in (call.k, call.v)]
    want = call.copy().portable()
    found = call.on_kernels(monkeypatch, seed=seed)
    assert device().report()["kernel"] == "flash8_append"
    assert_same(found, want)
    if call.k.x.numel():
        assert differs(found[:2], before)
    assert len(hopper.variants(call.k, call.v, queries=call.queries)) == launches


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_places(monkeypatch, kind, page_size):
    """Packed rows, one sequence without any, in slots that other rows of a table name."""
    dtype, cache = KINDS[kind]
    rotary = {} if dtype == E4M3 else {"rotary_dim": 32, "new_q": (2, 5, 1)}
    call = make(dtype, cache=cache, new=(5, 0, 17), page_size=page_size, rows=(4, 0, 2), **rotary)
    check(monkeypatch, call)


@pytest.mark.parametrize("style", ROTARY)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "bf16 to e4m3"])
def test_positions(monkeypatch, kind, style):
    dtype, cache = KINDS[kind]
    options = dict(ROTARY[style])
    if "table_dtype" in options:
        options["table_dtype"] = dtype
    check(monkeypatch, make(dtype, cache=cache, **options))


@pytest.mark.parametrize("style", ROTARY)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "bf16 to e4m3"])
def test_norms(monkeypatch, kind, style):
    """Of rows of nine groups of channels, before they are rotated."""
    dtype, cache = KINDS[kind]
    options = dict(ROTARY[style])
    if "table_dtype" in options:
        options["table_dtype"] = dtype
    call = make(dtype, cache=cache, norm_dtype=dtype if style == "halves" else FP32, **options)
    call.k.x[0, 0] = 0.0
    check(monkeypatch, call)


def test_rows_of_fp32_have_norms(monkeypatch):
    check(monkeypatch, make(FP32, norm_dtype=FP32, rotary_dim=32, new=(5, 0, 17)))


NUMBERS = [0, 1, 2, 13, (0, 0, 0), (1, 1, 1), (0, 31, 0), (11, 1, 29)]


@pytest.mark.parametrize("new", NUMBERS, ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_numbers_of_rows(monkeypatch, page_size, new):
    check(monkeypatch, make(new=new, page_size=page_size, rotary_dim=32, interleaved=False))


@pytest.mark.parametrize("packed", [False, True])
def test_queries_of_one_position(monkeypatch, packed):
    new_q = (4, 0, 9) if packed else 5
    call = make(new=3, new_q=new_q, rotary_dim=32, advances=False, offsets=(90, 0, 7))
    check(monkeypatch, call)


def test_offsets_are_not_lengths(monkeypatch):
    call = make(rotary_dim=32, offsets=(90, 3, 7))
    other = make(rotary_dim=32).copy()
    check(monkeypatch, call)
    assert differs([call.k.cache], other.on_kernels(monkeypatch)[:1])


def test_positions_without_a_row_in_the_tables(monkeypatch):
    check(monkeypatch, make(rotary_dim=32, offsets=(2**31 - 1, -(2**31), 139)))


def test_rows_without_work(monkeypatch):
    """Nothing of theirs is written; their queries are rotated all the same."""
    for page_size in (None, 16):
        call = make(rows=(-1, 3, -1), page_size=page_size, rotary_dim=32)
        check(monkeypatch, call)


@pytest.mark.parametrize("granularity", ["none", "tensor", "head", "block"])
def test_descales(monkeypatch, granularity):
    call = make(cache=E4M3, rotary_dim=32)
    shapes = {"tensor": (), "head": (3, 2), "block": (3, 2, 1)}
    descale = None
    if granularity != "none":
        descale = draw(*shapes[granularity], dtype=FP32, seed=8).abs() * 0.05 + 0.01
    mean = draw(2, WIDTH, dtype=FP32, seed=3)
    call.k = call.k._replace(descale=descale, mean=mean)
    call.v = call.v._replace(descale=descale, mean=None)
    check(monkeypatch, call)


def test_blocks_of_a_slot(monkeypatch):
    """New rows cross from one block of 128 tokens into the next."""
    call = make(cache=E4M3, new=20)
    longer = []
    for part in (call.k, call.v):
        cache = torch.zeros(3, 300, *part.cache.shape[2:]).to(E4M3)
        descale = draw(3, 2, 3, dtype=FP32, seed=4).abs() * 0.05 + 0.01
        longer.append(part._replace(cache=cache, descale=descale, starts=int32((120, 250, 0))))
    call.k, call.v = longer
    check(monkeypatch, call)


def test_types_that_differ_have_launches_of_their_own(monkeypatch):
    call = make(cache=E4M3, rotary_dim=32)
    call.queries = call.queries._replace(x=call.queries.x.half())
    check(monkeypatch, call, launches=2)
    names = [v.name for v in hopper.variants(call.k, call.v, queries=call.queries)]
    assert names == ["append_bf16_to_e4m3", "append_fp16"]
    call = make(cache=E4M3)
    call.v = call.v._replace(x=call.v.x.float())
    check(monkeypatch, call, launches=2)


def test_strides(monkeypatch):
    """Rows of interlaced caches, and new rows and queries that are parts of one projection."""
    call = make(page_size=16, rotary_dim=32)
    qkv = draw(3, 7, 3 + 2, WIDTH, seed=5)
    pair = draw(*call.k.cache.shape[:2], 2, 2, WIDTH, seed=6)
    table = torch.cat((call.k.rope.cos, call.k.rope.sin), 1)
    rope = call.k.rope._replace(cos=table[:, :16], sin=table[:, 16:])
    call.k = call.k._replace(x=qkv[:, :, 3:], cache=pair[:, :, 0], rope=rope)
    call.v = call.v._replace(x=qkv[:, :, :2], cache=pair[:, :, 1])
    call.queries = call.queries._replace(x=qkv[:, :, :3], rope=rope)
    with monkeypatch.context() as patch:
        patch.setattr(hopper.quantizer, "floats", lambda _: pytest.fail("tables are copied"))
        check(patch, call)


def test_nan_and_infinities_go_where_they_belong(monkeypatch):
    call = make(rotary_dim=32)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40], dtype=BF16)
    for x in (call.k.x, call.v.x, call.queries.x):
        x.view(-1)[::11] = odd.repeat(x.numel())[: x.view(-1)[::11].numel()]
    check(monkeypatch, call)


def test_what_has_no_position_is_copied_bit_by_bit(monkeypatch):
    """The payload of a NaN too."""
    call = make(rotary_dim=32)
    for x in (call.k.x, call.v.x):
        x.view(torch.int16).random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(1))
    k, v, *_ = call.on_kernels(monkeypatch)
    rows = slice(13, 20)
    assert torch.equal(v[0, rows].view(torch.int16), call.v.x[0].view(torch.int16))
    assert torch.equal(
        k[0, rows, :, 32:].view(torch.int16), call.k.x[0, ..., 32:].view(torch.int16)
    )


def test_lengths_alone(monkeypatch):
    """Without new rows a call still says how long its sequences are."""
    call = make(new=0)
    *_, lengths = call.on_kernels(monkeypatch)
    assert lengths.tolist() == [13, 0, 47] and lengths.dtype == torch.int32


def test_bits_do_not_depend_on_the_order_of_pages(monkeypatch):
    found = []
    for page_size in (1, 3, 16, 64):
        call = make(page_size=page_size, rotary_dim=32)
        k, *_ = call.on_kernels(monkeypatch)
        table = call.k.page_table
        positions = torch.arange(13, 20)
        found.append(bits(k[table[0, positions // page_size].long(), positions % page_size]))
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k._replace(cache=k.cache.half()), "the cache is torch.float16 and its new rows"),
        (lambda k: k._replace(x=k.x.double(), cache=k.cache.double()), "no appending kernel for"),
        (lambda k: k._replace(x=k.x[..., :36], cache=k.cache[..., :36]), "head_dim is 36"),
        (lambda k: k._replace(cache=k.cache[:0]), "the cache has room for nothing"),
        (lambda k: k._replace(cache=draw(3, 9, 2, 76)[..., :72]), "strides are not multiples of 8"),
        (lambda k: k._replace(page_table=int32([[]] * 3)), "the page table lists nothing"),
        (lambda k: k._replace(x=k.x[:, :, :1].expand(-1, -1, 21846, -1)), "there are 21846 heads"),
        (lambda k: k._replace(x=k.x.to(E4M3), cache=k.cache.to(E4M3)), "rotates no rows of"),
        (lambda k: k._replace(x=k.x[:, :1].expand(3, 2**30, 2, 72)), "3221225472 new rows"),
    ],
)
def test_refusals(change, message):
    assert message in hopper.refusal(change(make(rotary_dim=32).k))


def test_an_odd_address_is_refused():
    odd = draw(3 * 9 * 2 * 72 + 1)[1:].view(3, 9, 2, 72)
    assert "address" in hopper.refusal_of_address(odd)
    assert hopper.refusal_of_address(odd.clone()) is None


def test_variants_name_their_choices():
    assert AppendVariant("bf16", "e4m3").name == "append_bf16_to_e4m3"
    assert dict(AppendVariant("fp16").defines) == {"FLASH8_DTYPE": "kFp16", "FLASH8_CACHE": "kSame"}
    for change, message in (
        ({"dtype": "fp64"}, "dtype is 'fp64'; supported are"),
        ({"cache": "e5m2"}, "cache is 'e5m2'; supported are"),
        ({"dtype": "e4m3", "cache": "e4m3"}, "cache is 'e4m3'; rows of dtype 'e4m3' go there"),
    ):
        with pytest.raises(ValueError, match=message):
            AppendVariant(**{"dtype": "bf16", **change})
