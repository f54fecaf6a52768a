"""Cubins that travel with the package: what is loaded from where, and when they do not count."""

import json
import subprocess
import sys

import pytest

from compiler_fixtures import LOG, Workshop
from flash8.backends.hopper import kernels
from flash8.compiler import (
    MissingVariantError,
    Unit,
    compile_unit,
    kernel_image,
    packaged,
    packaged_cubin,
    write_package,
)
from flash8_cli import main
from repository import ROOT
from simulated_device import missing_compiler

pytest_plugins = ["compiler_fixtures"]


class Package:
    """Device code of two kernels, and a folder for the package's cubins."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.kernels = shop.folder / "kernels"
        self.hopper, self.quantize = (shop.folder / name for name in ("hopper", "cutlass_kernels"))
        for root, name in ((self.hopper, "forward"), (self.quantize, "cast")):
            root.mkdir()
            (root / "tile.h").write_text("// a tile\n")
            (root / f"{name}.cu").write_text(f'#include "tile.h"\n{LOG}')
        self.forward = Unit(self.hopper / "forward.cu", (("D", "128"),), "forward_d128")
        self.cast = Unit(self.quantize / "cast.cu", (), "cast")

    def ship(self) -> None:
        write_package([compile_unit(self.forward), compile_unit(self.cast)], self.kernels)
        forget()


def forget() -> None:
    packaged._device_code.cache_clear()


@pytest.fixture
def package(workshop, monkeypatch) -> Package:
    made = Package(workshop)
    monkeypatch.setattr(packaged, "packaged_root", lambda: made.kernels)
    monkeypatch.setattr(packaged, "kernel_root", lambda: made.hopper)
    monkeypatch.setattr(packaged, "cutlass_root", lambda: made.quantize)
    forget()
    yield made
    forget()


def test_a_shipped_cubin_needs_no_compiler(package, monkeypatch):
    package.ship()
    cubin = compile_unit(package.forward).cubin.read_bytes()
    monkeypatch.setenv("FLASH8_NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("FLASH8_CACHE", str(package.shop.folder / "empty"))
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    assert kernel_image(package.forward, "cubin") == cubin
    with pytest.raises(MissingVariantError):
        kernel_image(package.forward, "ptx")  # no package brings PTX


def test_without_a_package_the_cache_and_then_the_compiler_serve(package):
    assert packaged_cubin(package.forward) is None
    assert kernel_image(package.forward, "cubin")
    compilations = package.shop.compilations
    assert kernel_image(package.forward, "cubin") and kernel_image(package.forward, "ptx")
    assert package.shop.compilations == compilations


@pytest.mark.parametrize("change", ["source", "header", "defines", "cubin", "manifest"])
def test_a_cubin_of_other_device_code_does_not_count(package, change):
    package.ship()
    assert packaged_cubin(package.forward) is not None
    unit = package.forward
    if change == "defines":
        unit = Unit(unit.source, (("D", "64"),), unit.name)
    elif change == "cubin":
        (package.kernels / "forward_d128.cubin").unlink()
    elif change == "manifest":
        (package.kernels / "manifest.json").write_text("{")
    else:
        path = unit.source if change == "source" else package.quantize / "tile.h"
        path.write_text(path.read_text() + "// changed\n")
    forget()
    assert packaged_cubin(unit) is None
    assert kernel_image(unit, "cubin")


@pytest.mark.parametrize(
    "text", ["5", "[1, 2]", '{"forward_d128": 5}', '{"forward_d128": {"sha256": 1}}', "[" * 100000]
)
def test_a_manifest_of_another_shape_counts_as_none(package, text):
    package.ship()
    (package.kernels / "manifest.json").write_text(text)
    forget()
    assert packaged_cubin(package.forward) is None
    assert kernel_image(package.forward, "cubin")


@pytest.mark.parametrize("damage", ["cut", "bit", "folder"])
def test_a_damaged_cubin_does_not_count(package, damage):
    package.ship()
    path = package.kernels / "forward_d128.cubin"
    cubin = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(cubin[:-1] if damage == "cut" else bytes([cubin[0] ^ 1]) + cubin[1:])
    assert packaged_cubin(package.forward) is None
    assert kernel_image(package.forward, "cubin") == cubin


def test_what_cannot_be_shipped_is_named(package, tmp_path):
    unnamed = compile_unit(Unit(package.forward.source))
    with pytest.raises(ValueError, match="has no name to ship it under"):
        write_package([unnamed], tmp_path / "out")
    elsewhere = tmp_path / "foreign.cu"
    elsewhere.write_text(LOG)
    foreign = compile_unit(Unit(elsewhere, (), "foreign"))
    with pytest.raises(ValueError, match="no part of the device code"):
        write_package([foreign], tmp_path / "out")


class Row:
    def __init__(self, unit):
        self.unit = lambda: unit


def test_compile_into_a_folder(package, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "shipped", lambda: [Row(package.forward), Row(package.cast)])
    assert main(["compile", "--all", "--into", str(package.kernels)]) == 0
    assert "2 cubins are in" in capsys.readouterr().out
    assert set(json.loads((package.kernels / "manifest.json").read_text())) == {
        "forward_d128",
        "cast",
    }
    forget()
    assert packaged_cubin(package.cast) == package.kernels / "cast.cubin"
    assert main(["compile", str(package.shop.source), "--into", str(package.kernels)]) == 2
    assert "--into goes with --all" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(7200)  # a quarter of an hour of CPU time where no other test has compiled them
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_the_kernels_target_builds_what_ships(tmp_path):
    pybind11 = [sys.executable, "-m", "pybind11", "--cmakedir"]
    folder = subprocess.run(pybind11, capture_output=True, text=True, check=True).stdout.strip()
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-Dpybind11_DIR={folder}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug"]
    subprocess.run(configure, check=True, capture_output=True)
    build = ["cmake", "--build", str(tmp_path), "--target", "kernels", "-j", "2"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "kernels" / "manifest.json").read_text())
    names = {x.unit().name for row in kernels.shipped() for x in kernels.kernels_of(row)}
    assert set(manifest) == names
    assert {path.stem for path in (tmp_path / "kernels").glob("*.cubin")} == names
