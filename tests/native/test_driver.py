"""The driver table, memory and streams, against a driver that does nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import light_process
from flash8 import _native

pytest_plugins = ["driver_fixtures"]


def run_with_driver(path: Path, code: str) -> str:
    return light_process.run(f"from flash8 import _native\n{code}", FLASH8_DRIVER=str(path)).strip()


def test_probe_reports_the_named_driver(fake_library):
    code = "p = _native.probe_driver(); print(p.available, p.version, p.path, p.reason, p.devices)"
    said = run_with_driver(fake_library, code)
    device = "DeviceInfo(ordinal=0, name='Fake 0', compute_capability=(9, 0))"
    assert said == f"True 13000 {fake_library}  [{device}]"


def test_process_driver_is_one_for_the_process(fake_library):
    code = "print(_native.Driver.process() is _native.Driver.process())"
    assert run_with_driver(fake_library, code) == "True"


def test_devices(fake, driver):
    fake.reset(devices=3)
    devices = driver.devices()
    assert [device.ordinal for device in devices] == [0, 1, 2]
    assert [device.name for device in devices] == ["Fake 0", "Fake 1", "Fake 2"]
    assert {device.multiprocessors for device in devices} == {132}
    assert {device.max_shared_bytes for device in devices} == {232448}


def test_a_missing_library_is_named():
    with pytest.raises(_native.DriverNotFoundError, match=r"libcuda_absent\.so"):
        _native.Driver("/nowhere/libcuda_absent.so")


def test_a_failed_start_carries_the_drivers_name_for_it(fake):
    fake.fail("cuInit", 100)
    with pytest.raises(_native.DriverError) as caught:
        _native.Driver(str(fake.path))
    error = caught.value
    assert (error.entry, error.code, error.name) == ("cuInit", 100, "CUDA_ERROR_NO_DEVICE")
    assert str(error) == "cuInit: CUDA_ERROR_NO_DEVICE"
    assert isinstance(error, RuntimeError)


def test_error_text_is_the_drivers(fake, driver):
    fake.fail("cuMemAlloc_v2", 2)
    with pytest.raises(
        _native.DriverError, match=r"^cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)$"
    ):
        _native.DeviceMemory(driver, 16)


def test_an_error_unknown_to_the_driver_keeps_its_number(fake, driver):
    fake.fail("cuDeviceGetCount", 12345)
    with pytest.raises(_native.DriverError, match=r"^cuDeviceGetCount: CUDA error 12345$"):
        driver.devices()


def test_memory_round_trip(fake, driver):
    memory = _native.DeviceMemory(driver, 8)
    assert memory.bytes == 8
    assert memory.address % 8 == 0
    memory.write(b"12345678")
    memory.write(b"AB", offset=3)
    assert memory.read() == b"123AB678"
    assert memory.read(3, offset=2) == b"3AB"
    assert memory.read(offset=6) == b"78"
    del memory
    assert fake.alive == 0


@pytest.mark.parametrize(
    ("offset", "data"), [(7, b"12"), (9, b""), (2**63, b"1"), (0, b"123456789")]
)
def test_memory_refuses_what_does_not_fit(driver, offset, data):
    memory = _native.DeviceMemory(driver, 8)
    with pytest.raises(
        ValueError, match=f"at offset {offset} do not fit in device memory of 8 bytes"
    ):
        memory.write(data, offset=offset)


def test_memory_refuses_a_strided_buffer(driver):
    memory = _native.DeviceMemory(driver, 8)
    with pytest.raises(ValueError, match="not contiguous"):
        memory.write(memoryview(b"12345678")[::2])


def test_empty_memory_is_refused(driver):
    with pytest.raises(ValueError, match="bytes is 0"):
        _native.DeviceMemory(driver, 0)


def test_a_failed_free_is_silent(fake, driver):
    memory = _native.DeviceMemory(driver, 8)
    fake.fail("cuMemFree_v2", 1)
    del memory
    assert fake.count("cuMemFree_v2") == 1


def test_stream(fake, driver):
    stream = _native.Stream(driver)
    assert stream.handle == 77
    stream.synchronize()
    del stream
    assert fake.count("cuStreamSynchronize") == 1
    assert fake.count("cuStreamDestroy_v2") == 1


def test_capture_fails_what_would_spoil_a_graph(fake, driver):
    """What tests of captured launches rely on."""
    fake.capture(True)
    for illegal in (driver.synchronize, lambda: _native.DeviceMemory(driver, 16)):
        with pytest.raises(_native.DriverError, match="STREAM_CAPTURE_UNSUPPORTED"):
            illegal()


def test_synchronize_runs_in_the_devices_context(fake, driver):
    fake.reset(devices=2)
    driver.synchronize(1)
    assert fake.count("cuCtxSynchronize") == 1
    assert fake.count("cuDevicePrimaryCtxRetain") == 1


@pytest.mark.parametrize("device", [-1, 2])
def test_a_device_out_of_range_is_named(fake, driver, device):
    fake.reset(devices=2)
    with pytest.raises(ValueError, match=rf"device is {device}; the driver has 2 device\(s\)"):
        driver.synchronize(device)


def test_a_context_is_retained_once_for_all_threads(fake, driver):
    def work(index: int) -> bytes:
        memory = _native.DeviceMemory(driver, 64)
        memory.write(bytes([index]) * 64)
        return memory.read()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(64)))
    assert results == [bytes([index]) * 64 for index in range(64)]
    assert fake.count("cuDevicePrimaryCtxRetain") == 1
    assert fake.alive == 0
