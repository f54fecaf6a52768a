"""Fixtures of the host-layer tests: a fake driver, and flash8's view of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_driver import control
from flash8 import _native


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return control.build(tmp_path_factory.mktemp("fake_driver"))


@pytest.fixture
def fake(fake_library: Path) -> Iterator[control.FakeDriver]:
    """The fake driver with one device, as if just loaded. What a test sets is undone in the end."""
    driver = control.FakeDriver(fake_library)
    driver.reset()
    yield driver
    assert driver.context_depth == 0 and driver.capture_mode == 0


@pytest.fixture
def driver(fake: control.FakeDriver) -> _native.Driver:
    return _native.Driver(str(fake.path))
