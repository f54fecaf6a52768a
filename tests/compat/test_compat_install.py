"""The bare names: found, refused where the real package is, and taken away again."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from flash8.compat import install, uninstall

NAMES = ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn_3")


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] in NAMES]


def test_names_are_the_modules_themselves():
    with install():
        import flash_attn.layers.rotary
        import flash_attn_3.flash_attn_interface

        assert flash_attn.__name__ == "flash8.compat.flash_attn"
        assert flash_attn.layers.rotary is importlib.import_module(
            "flash8.compat.flash_attn.layers.rotary"
        )
        ours = importlib.import_module("flash8.compat.flash_attn_3.flash_attn_interface")
        assert flash_attn_3.flash_attn_interface is ours
        assert ours.__spec__.name == ours.__name__
        for name in NAMES:
            assert importlib.util.find_spec(name) is not None
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.cute"):
            importlib.import_module("flash_attn.cute")
    for name in NAMES:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_versions_are_found():
    with install():
        import flash_attn
        import flash_attn_3

        assert importlib.metadata.version("flash-attn") == flash_attn.__version__
        assert importlib.metadata.version("flash_attn_3") == flash_attn_3.__version__
        assert importlib.metadata.version("torch")
        mapping = importlib.metadata.packages_distributions()
        assert mapping["flash_attn"] == ["flash-attn"]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_one_package_alone():
    with install("flash_attn_3"):
        assert importlib.import_module("flash_attn_interface").flash_attn_func
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn")
    with pytest.raises(ValueError, match="packages must be of flash_attn, flash_attn_3"):
        install("flash_attn_4")


def test_a_second_call_changes_nothing():
    first = install()
    assert install() is first
    first.remove()
    first.remove()
    uninstall()
    assert install() is not first


def test_the_real_one_is_refused_when_imported(monkeypatch):
    real = ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", real)
    with pytest.raises(RuntimeError, match="flash_attn_interface is imported in this process"):
        install()
    with install(replace=True):
        assert importlib.import_module("flash_attn_interface") is not real
    assert sys.modules["flash_attn_interface"] is real
    monkeypatch.undo()


def test_the_real_one_is_refused_when_installed(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = 'real'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="flash_attn is installed"):
        install()
    with install(replace=True):
        assert importlib.import_module("flash_attn").__version__ != "real"
    assert importlib.import_module("flash_attn").__version__ == "real"
    del sys.modules["flash_attn"]


def test_import_flash8_does_not_import_it():
    code = "import sys, flash8, flash8.nn; assert 'flash8.compat' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
