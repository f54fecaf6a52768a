"""FlashAttention's bare module names on `flash8.compat`, for code that cannot be edited.

`import flash_attn.layers.rotary` then gives the module `flash8.compat.flash_attn.layers.rotary`
itself, not a second copy, and `importlib.metadata.version("flash-attn")` the release whose
interface it has.
"""

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_OURS = "flash8.compat"
#: The modules of each name that can be installed, and the distribution that brings them.
_PACKAGES = {
    "flash_attn": (("flash_attn", "flash_attn_2_cuda"), "flash-attn", "2.8.3"),
    "flash_attn_3": (("flash_attn_interface", "flash_attn_3"), "flash-attn-3", "3.0.0"),
}


class Installation:
    """What `install` has registered; `remove()`, or leaving a `with` block, undoes it."""

    def __init__(self, packages: Sequence[str], replace: bool) -> None:
        self._roots = frozenset(root for name in packages for root in _PACKAGES[name][0])
        if not replace:
            _refuse_the_real(packages)
        self._replaced = {name: x for name, x in sys.modules.items() if self._covers(name)}
        for name in self._replaced:
            del sys.modules[name]
        self._finder = _Finder(self._roots, packages)
        sys.meta_path.insert(0, self._finder)

    def _covers(self, name: str) -> bool:
        return name.split(".")[0] in self._roots

    def remove(self) -> None:
        """Takes the names away again, and puts back what was there. A second call does nothing."""
        global _current
        if self._finder not in sys.meta_path:
            return
        sys.meta_path.remove(self._finder)
        for name in [name for name in sys.modules if self._covers(name)]:
            del sys.modules[name]
        sys.modules.update(self._replaced)
        importlib.invalidate_caches()
        _current = None

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_current: Installation | None = None


def install(*packages: str, replace: bool = False) -> Installation:
    """Makes `import flash_attn`, `flash_attn_interface` and `flash_attn_3` find `flash8.compat`.

    Call it before the code that imports them: names that other modules have imported already stay
    what they are. A second call returns the first one's installation.

    Args:
        packages: "flash_attn" (FlashAttention-2) and "flash_attn_3" (FlashAttention-3); all by
            default.
        replace: also where the real package is installed or imported. It is back after `remove()`.

    Raises:
        RuntimeError: the real package is installed or imported, which is named.
    """
    global _current
    unknown = set(packages) - set(_PACKAGES)
    if unknown:
        raise ValueError(f"packages must be of {', '.join(_PACKAGES)}, got {min(unknown)!r}")
    if _current is None:
        _current = Installation(packages or tuple(_PACKAGES), replace)
    return _current


def uninstall() -> None:
    """Undoes `install`, if it was called."""
    if _current is not None:
        _current.remove()


def _refuse_the_real(packages: Iterable[str]) -> None:
    for package in packages:
        modules, distribution, _ = _PACKAGES[package]
        for module in modules:
            if module in sys.modules:
                state = "imported in this process"
            elif importlib.util.find_spec(module) is not None:
                state = "installed"
            else:
                continue
            raise RuntimeError(
                f"{module} is {state} ({distribution}): flash8.compat takes its place with "
                "install(replace=True); or import from flash8.compat, which leaves it alone"
            )


_EVERY_DISTRIBUTION = importlib.metadata.DistributionFinder.Context()


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the modules under the roots in `flash8.compat`, and their distributions."""

    def __init__(self, roots: frozenset[str], packages: Sequence[str]) -> None:
        self._roots = roots
        self._distributions = [_Distribution(*_PACKAGES[name]) for name in packages]

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] not in self._roots:
            return None
        ours = importlib.util.find_spec(f"{_OURS}.{fullname}")
        if ours is None:
            return None
        package = ours.submodule_search_locations is not None
        return ModuleSpec(fullname, _Alias(), origin=ours.origin, is_package=package)

    def find_distributions(
        self, context: Any = _EVERY_DISTRIBUTION
    ) -> Iterator[importlib.metadata.Distribution]:
        for distribution in self._distributions:
            if context.name is None or _normal(context.name) == distribution.name:
                yield distribution


class _Alias(importlib.abc.Loader):
    """Puts our module itself under the alias: the import system returns what stands there."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(f"{_OURS}.{module.__name__}")


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, modules: Sequence[str], name: str, version: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "top_level.txt": "\n".join(modules),
        }

    @property
    def name(self) -> str:
        return self.metadata["Name"]

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{self.name} stands for flash8.compat and has no files: {path}")


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")
