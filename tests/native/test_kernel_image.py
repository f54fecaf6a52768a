"""kernel_info, as the host reads it out of a cubin or PTX before the driver sees it."""

import random

import pytest

from defaults import SHIPPED_BY_DEFAULT
from fake_driver.cubin import LAYOUT, elf, fake_cubin, kernel_info
from flash8 import _native
from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS
from flash8.compiler import Unit, compile_unit
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures"]

SIZE = LAYOUT["KernelInfo"]["size"]
INFO = kernel_info(entry="found", kBlockM=192)


def info(driver, image: bytes) -> _native.KernelInfo:
    return _native.Library(driver, image).info()


def test_it_is_found_between_others(driver):
    constants = bytes(68) + INFO + b"behind"
    symbols = {"a": (0, 68), "kernel_info": (68, SIZE), "kernel_info_too": (4, 8)}
    # The fake driver takes its own from the start: only what the host reads is looked at.
    found = info(driver, elf(constants, symbols))
    assert (found.entry, found.block_m, found.threads) == ("found", 192, 384)


@pytest.mark.parametrize(
    "image",
    [
        elf(INFO, {"other": (0, SIZE)}),
        elf(INFO, {}),
        elf(INFO, {"kernel_inf": (0, SIZE), "kernel_infos": (0, SIZE)}),
    ],
)
def test_an_image_without_it_says_so(driver, image):
    with pytest.raises(RuntimeError, match="exports no kernel_info"):
        info(driver, image)


@pytest.mark.parametrize("place", [(4, SIZE), (SIZE, 1), (2**63, SIZE), (0, 2**64 - 1)])
def test_one_that_lies_outside_of_its_section_is_refused(driver, place):
    with pytest.raises(ValueError, match="kernel_info does not lie within its section"):
        _native.Library(driver, elf(INFO, {"kernel_info": place}))


@pytest.mark.parametrize("size", [1, SIZE - 4])
def test_one_of_another_size_is_of_another_version(driver, size):
    with pytest.raises(RuntimeError, match=f"and {size} bytes; this flash8 reads version"):
        info(driver, elf(INFO, {"kernel_info": (0, size)}))


@pytest.mark.parametrize("change", [{"kBlockM": 0}, {"threads": -1}, {"cluster": (1, 0, 1)}])
def test_counts_that_divide_nothing_are_refused(driver, change):
    with pytest.raises(RuntimeError, match="kBlockM, threads or cluster below 1"):
        info(driver, fake_cubin(**change))


def test_a_cubin_that_is_cut_off_never_reaches_the_driver(fake, driver):
    """The driver is told no length."""
    whole = fake_cubin()
    for size in (*range(4, 64), *range(64, len(whole), 7), len(whole) - 1):
        with pytest.raises(ValueError, match=r"^cubin: "):
            _native.Library(driver, whole[:size])
    assert fake.count("cuLibraryLoadData") == 0


def test_a_damaged_cubin_is_read_or_refused(driver):
    """Whatever stands in its tables, nothing outside of it is read (`make sanitize` watches)."""
    choose, whole = random.Random(0), fake_cubin()
    seen = set()
    for _ in range(3000):
        image = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            tables = choose.choice([range(64), range(64 + SIZE, len(whole))])
            at = choose.choice(tables)
            image[at] = choose.choice([0, 1, 0x7F, 0xFF, choose.randrange(256)])
        try:
            info(driver, bytes(image))
        except (ValueError, RuntimeError) as error:
            seen.add(str(error).split()[0])
    assert {"cubin:", "the"} <= seen


def ptx(values: str, size: int = SIZE) -> bytes:
    return f"\n.const .align 4 .b8 kernel_info[{size}] = {{{values}}};\n".encode() + b"\0"


def test_what_an_initialiser_leaves_out_is_zero(driver):
    values = ", ".join(map(str, INFO.rstrip(b"\0")))
    found = info(driver, b".version 8.8\n" + ptx(values))
    assert (found.entry, found.block_m) == ("found", 192)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ptx("3, 0, x"), "no initialiser of plain bytes"),
        (ptx("3, 256"), "256 in kernel_info is no byte"),
        (ptx("3, 0"[:-1]), "no initialiser of plain bytes"),
        (ptx("1", size=10**12), "no initialiser of plain bytes"),
        (b".const .b8 kernel_info[404];", "no initialiser of plain bytes"),
        (b".const .b8 kernel_info[", "no initialiser of plain bytes"),
        (b".const .b8 kernel_info[404] = {3", "no initialiser of plain bytes"),
    ],
)
def test_ptx_with_another_initialiser_is_refused(driver, image, message):
    with pytest.raises(ValueError, match=f"^ptx: .*{message}"):
        _native.Library(driver, image)


needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

SOURCE = """
#include "kernel_info.h"
extern "C" __constant__ int before[3] = {1, 2, 3};
extern "C" __constant__ flash8::KernelInfo kernel_info = {
    flash8::kAbiVersion, sizeof(flash8::KernelInfo), 8,
    flash8::KernelKind::kOther, "twice", 64, 32, 16, 8, 5, 128, 1, {2, 1, 1}, 65536};
extern "C" __constant__ float behind[5] = {0.5f};
extern "C" __global__ void twice(int* data) {
    data[threadIdx.x] = before[threadIdx.x % 3] + static_cast<int>(behind[threadIdx.x % 5]);
}
"""


@needs_compiler
def test_a_compiled_cubin_and_its_ptx_say_the_same(tmp_path, driver):
    source = tmp_path / "twice.cu"
    source.write_text(SOURCE)
    compiled = compile_unit(Unit(source))
    found = [described(driver, image) for image in images(compiled)]
    assert found[0] == found[1]
    assert found[0]["entry"] == "twice" and found[0]["cluster"] == (2, 1, 1)
    assert [found[0][name] for name in ("block_m", "block_n", "stages")] == [64, 32, 5]


@needs_compiler
@pytest.mark.parametrize(
    "variant", [*SHIPPED_BY_DEFAULT[:1], *SHIPPED_BY_DEFAULT[-1:], *SHIPPED_QUANTIZERS[:1]]
)
def test_shipped_kernels_say_what_they_are(variant, driver):
    cubin, text = (described(driver, image) for image in images(compile_unit(variant.unit())))
    assert cubin == text
    assert cubin["abi_version"] == _native.ABI_VERSION and cubin["entry"].startswith("flash8_")


def images(compiled) -> tuple[bytes, bytes]:
    return compiled.cubin.read_bytes(), compiled.ptx.read_bytes() + b"\0"


def described(driver, image: bytes) -> dict[str, object]:
    found = info(driver, image)
    names = [name for name in dir(found) if not name.startswith("_")]
    return {name: getattr(found, name) for name in names}
