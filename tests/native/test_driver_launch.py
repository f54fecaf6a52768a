"""Libraries, kernels, launches and the registry, against a driver that does nothing."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

SIZE = LAYOUT["KernelInfo"]["size"]
FORWARD = bytes([42]) + bytes(LAYOUT["ForwardParams"]["size"] - 1)


@pytest.fixture
def kernel(driver) -> _native.Kernel:
    return _native.Library(driver, fake_cubin()).kernel()


@pytest.fixture
def plain(driver) -> _native.Kernel:
    return _native.Library(driver, fake_cubin()).kernel("plain")


# ---- libraries ----


def test_kernel_info_is_read_from_the_cubin(driver):
    info = _native.Library(driver, fake_cubin(kBlockM=192, cluster=(2, 1, 1), kind=4)).info()
    assert (info.entry, info.kind, info.block_m, info.block_n) == ("forward", 4, 192, 128)
    assert (info.threads, info.cluster, info.shared_bytes) == (384, (2, 1, 1), 200_000)


def test_a_library_is_unloaded_with_its_last_kernel(fake, driver):
    library = _native.Library(driver, fake_cubin())
    kernel = library.kernel()
    del library
    assert fake.alive == 1
    del kernel
    assert fake.alive == 0


@pytest.mark.parametrize("change", [{"abi_version": _native.ABI_VERSION + 1}, {"info_bytes": 396}])
def test_another_abi_is_refused(driver, change):
    reads = f"this flash8 reads version {_native.ABI_VERSION} with {SIZE} bytes"
    with pytest.raises(RuntimeError, match=reads):
        _native.Library(driver, fake_cubin(**change)).kernel()


@pytest.mark.parametrize("entry", ["", "x" * 64])
def test_kernel_info_must_name_its_entry(driver, entry):
    with pytest.raises(RuntimeError, match="kernel_info names no entry"):
        _native.Library(driver, fake_cubin(entry=entry)).kernel()


def test_an_unknown_kernel_is_the_drivers_error(driver):
    with pytest.raises(_native.DriverError) as caught:
        _native.Library(driver, fake_cubin()).kernel("absent")
    assert caught.value.name == "CUDA_ERROR_NOT_FOUND"


def test_a_refused_image_leaks_nothing(fake, driver):
    fake.fail("cuLibraryLoadData", 1)
    with pytest.raises(_native.DriverError, match="cuLibraryLoadData: CUDA_ERROR_INVALID_VALUE"):
        _native.Library(driver, fake_cubin())
    assert fake.alive == 0
    assert fake.count("cuLibraryUnload") == 0


# ---- launches ----


def test_launch_takes_its_shape_from_kernel_info(fake, driver):
    kernel = _native.Library(driver, fake_cubin(cluster=(2, 1, 1))).kernel()
    kernel.launch((4, 2, 1), [FORWARD], stream=99)
    assert fake.launches == [
        "forward device=0 grid=4,2,1 block=384,1,1 shared=200000 stream=99 cluster=2,1,1 first=42"
    ]


def test_launch_of_a_plain_kernel(fake, plain):
    plain.launch((1, 1, 1), [b"\x07", b"\x08"], block=(32, 2, 1), overlap_previous=True)
    assert fake.launches == [
        "plain device=0 grid=1,1,1 block=32,2,1 shared=0 stream=0 attribute6=1 first=7"
    ]


def test_launch_without_parameters(fake, plain):
    plain.launch((1, 1, 1), [], block=(32, 1, 1))
    assert len(fake.launches) == 1


def test_shared_memory_is_asked_for_once(fake, kernel):
    for _ in range(5):
        kernel.launch((1, 1, 1), [FORWARD])
    assert fake.count("cuFuncSetAttribute") == 1
    assert fake.count("cuKernelGetFunction") == 1


def test_shared_memory_is_asked_for_again_only_when_it_grows(fake, plain):
    for shared_bytes in (0, 1000, 48 * 1024, 60_000, 50_000, 70_000):
        plain.launch((1, 1, 1), [], block=(32, 1, 1), shared_bytes=shared_bytes)
    assert fake.count("cuFuncSetAttribute") == 4


def test_a_wide_cluster_is_asked_for_once(fake, plain):
    for cluster in ((8, 1, 1), (16, 1, 1), (4, 4, 1)):
        plain.launch((16, 4, 1), [], block=(32, 1, 1), cluster=cluster)
    assert fake.count("cuFuncSetAttribute") == 1


def test_devices_have_their_own_function_and_context(fake, kernel):
    fake.reset(devices=3)
    for device in (0, 2, 0, 2, 1):
        kernel.launch((1, 1, 1), [FORWARD], device=device)
    assert [re.search(r"device=(\d)", line)[1] for line in fake.launches] == list("02021")
    assert fake.count("cuKernelGetFunction") == 3
    assert fake.count("cuFuncSetAttribute") == 3


def test_threads_share_a_kernel(fake, kernel):
    fake.reset(devices=2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: kernel.launch((i + 1, 1, 1), [FORWARD], device=i % 2), range(200)))
    grids = sorted(int(re.search(r"grid=(\d+)", line)[1]) for line in fake.launches)
    assert grids == list(range(1, 201))
    assert fake.count("cuFuncSetAttribute") == 2


def test_registers_and_local_memory(kernel):
    assert kernel.registers() == 168
    assert kernel.local_bytes() == 0


def test_a_refused_launch_is_the_drivers_error(fake, kernel):
    fake.fail("cuLaunchKernelEx", 1)
    with pytest.raises(_native.DriverError, match="cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((1, 1, 1), [FORWARD])


BAD_SHAPES = [
    ({"grid": (0, 1, 1)}, r"grid is \(0, 1, 1\)"),
    ({"grid": (1, 65536, 1)}, r"grid is \(1, 65536, 1\)"),
    ({"grid": (2**31, 1, 1)}, r"grid is \(2147483648, 1, 1\)"),
    ({"block": (1024, 2, 1)}, r"block is \(1024, 2, 1\); at most 1024 threads"),
    ({"block": (1, 1, 65)}, r"block is \(1, 1, 65\)"),
    (
        {"cluster": (2, 1, 1)},
        r"grid is \(3, 1, 1\); it must be a multiple of the cluster, \(2, 1, 1\)",
    ),
    ({"grid": (32, 1, 1), "cluster": (32, 1, 1)}, r"cluster is \(32, 1, 1\)"),
    ({"grid": (8, 8, 1), "cluster": (8, 4, 1)}, r"cluster is \(8, 4, 1\); at most 16 CTAs"),
    ({"shared_bytes": 227 * 1024 + 1}, "shared_bytes is 232449; supported are 0 to 232448"),
    ({"shared_bytes": -1}, "shared_bytes is -1"),
    ({"parameters": [b"1"] * 65}, "there are 65 parameters; at most 64"),
    ({"device": 5}, r"device is 5; the driver has 1 device\(s\)"),
    ({"parameters": [memoryview(b"1234")[::2]]}, "not contiguous"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SHAPES)
def test_what_no_device_can_run_is_refused(fake, plain, change, message):
    arguments = {"grid": (3, 1, 1), "parameters": [], "block": (32, 1, 1), **change}
    with pytest.raises(ValueError, match=message):
        plain.launch(**arguments)
    assert fake.launches == []


def test_a_plain_kernel_needs_a_block(plain):
    with pytest.raises(ValueError, match="plain exports no kernel_info; pass block"):
        plain.launch((1, 1, 1), [])


@pytest.mark.parametrize("parameters", [[], [FORWARD[:-1]], [FORWARD, FORWARD]])
def test_parameters_must_fit_kernel_info(kernel, parameters):
    with pytest.raises(ValueError, match=f"forward takes one parameter of {len(FORWARD)} bytes"):
        kernel.launch((1, 1, 1), parameters)


def test_a_launch_is_captured_while_its_stream_captures(fake, kernel):
    assert not kernel.is_captured(0, 77)
    fake.capture(True)
    assert kernel.is_captured(0, 77)
    fake.fail("cuStreamIsCapturing", 1)
    with pytest.raises(_native.DriverError, match="cuStreamIsCapturing"):
        kernel.is_captured(0, 77)


# ---- the registry ----


def test_registry_resolves_a_key_once_for_all_threads(driver):
    asked, started = [], threading.Event()

    def resolve(key: str, image: str) -> bytes:
        asked.append(key)
        started.wait(0.05)
        return fake_cubin()

    registry = _native.Registry(driver, resolve)
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda i: registry.get("ab"[i % 2]), range(40)))
    assert sorted(asked) == ["a", "b"]
    assert len({id(kernel) for kernel in kernels}) == 2


def test_registry_asks_again_after_a_failure(driver):
    outcomes = [KeyError("no such variant"), fake_cubin()]

    def resolve(key: str, image: str) -> bytes:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    registry = _native.Registry(driver, resolve)
    with pytest.raises(KeyError, match="no such variant"):
        registry.get("d128")
    assert registry.get("d128").name == "forward"
    assert outcomes == []


def test_registry_hands_over_ptx_where_the_cubin_is_not_for_the_device(fake, driver):
    images = {"cubin": fake_cubin(entry="wrong"), "ptx": fake_cubin(entry="from_ptx")}
    asked = []

    def resolve(key: str, image: str) -> bytes:
        asked.append(image)
        fake.fail("cuLibraryLoadData", 209 if image == "cubin" else 0)
        return images[image]

    assert _native.Registry(driver, resolve).get("d128").name == "from_ptx"
    assert asked == ["cubin", "ptx"]


def test_registry_does_not_hide_another_refusal(fake, driver):
    fake.fail("cuLibraryLoadData", 2)
    with pytest.raises(_native.DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        _native.Registry(driver, lambda key, image: fake_cubin()).get("d128")
