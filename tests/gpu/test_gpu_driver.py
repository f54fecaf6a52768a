"""The host layer on a real driver: compile, load, read kernel_info, launch, read back.

Needs a Hopper GPU and a CUDA compiler; any driver that FLASH8_DRIVER names will do.
"""

import os
import struct
from pathlib import Path

import pytest

from flash8 import _native
from flash8.compiler import CompilerNotFoundError, Unit, compile_unit, find_toolchain

SOURCE = Path(__file__).resolve().parent / "gpu_driver.cu"
#: A folder with gpu_driver.cubin and .ptx, for machines that compile nothing.
COMPILED = os.environ.get("FLASH8_GPU_TESTS")


def unmet_need() -> str:
    probe = _native.probe_driver()
    if not probe.available:
        return f"no driver: {probe.reason}"
    if probe.devices[0].compute_capability != (9, 0):
        return f"{probe.devices[0].name} is not a Hopper GPU"
    try:
        if COMPILED is None:
            find_toolchain()
    except CompilerNotFoundError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(unmet_need()), reason=unmet_need())]


@pytest.fixture(scope="module")
def images() -> dict[str, Path]:
    if COMPILED is not None:
        return {kind: Path(COMPILED) / f"gpu_driver.{kind}" for kind in ("cubin", "ptx")}
    compiled = compile_unit(Unit(SOURCE))
    return {"cubin": compiled.cubin, "ptx": compiled.ptx}


@pytest.fixture(scope="module")
def kernel(images: dict[str, Path]) -> _native.Kernel:
    registry = _native.Registry(
        _native.Driver.process(), lambda key, image: images[image].read_bytes()
    )
    return registry.get("scale")


def test_kernel_info_comes_out_of_the_loaded_kernel(kernel: _native.Kernel) -> None:
    info = kernel.info
    assert info is not None
    assert (info.entry, info.params_bytes, info.threads) == ("scale", 16, 128)
    assert (info.cluster, info.shared_bytes) == ((2, 1, 1), 65536)


def test_a_launch_with_a_cluster_and_much_shared_memory(kernel: _native.Kernel) -> None:
    driver, count = _native.Driver.process(), 1000
    memory = _native.DeviceMemory(driver, 4 * count)
    memory.write(struct.pack(f"<{count}f", *range(count)))
    stream = _native.Stream(driver)
    parameters = struct.pack("<Qif", memory.address, count, 3.0)
    kernel.launch((8, 1, 1), [parameters], stream=stream.handle)
    stream.synchronize()
    assert struct.unpack(f"<{count}f", memory.read()) == tuple(3.0 * i for i in range(count))


def test_a_kernel_by_name_with_two_parameters(images: dict[str, Path]) -> None:
    driver = _native.Driver.process()
    try:
        library = _native.Library(driver, images["cubin"].read_bytes())
    except _native.DriverError as error:
        if error.name != "CUDA_ERROR_NO_BINARY_FOR_GPU":
            raise
        library = _native.Library(driver, images["ptx"].read_bytes())
    memory = _native.DeviceMemory(driver, 4 * 32)
    memory.write(bytes(4 * 32))
    parameters = [struct.pack("<Q", memory.address), struct.pack("<i", 41)]
    library.kernel("add").launch((1, 1, 1), parameters, block=(32, 1, 1))
    driver.synchronize()
    assert struct.unpack("<32i", memory.read()) == (41,) * 32


def test_an_image_of_nonsense_is_refused() -> None:
    with pytest.raises(_native.DriverError, match=r"^cuLibraryLoadData: CUDA_ERROR_"):
        _native.Library(_native.Driver.process(), b"nonsense" * 100)


def test_a_tensor_map_is_encoded() -> None:
    encoded = _native.encode_tensor_map(
        _native.Driver.process(),
        element_type=_native.ElementType.BFLOAT16,
        address=1 << 20,
        dims=[128, 1000, 8, 2],
        strides=[2048, 256, 2_048_000],
        box=[64, 128, 1, 1],
        swizzle=_native.Swizzle.B128,
    )
    assert len(encoded) == 128
    assert any(encoded)
