"""The legs by name; one is imported when it is first wanted."""

from collections.abc import Mapping
from importlib import import_module

from fuzz.harness import Call


def of(weights: Mapping[str, float]) -> dict[str, tuple[float, Call]]:
    """The legs of these names with their weights; without a CUDA compiler not the device's."""
    found = {}
    for name, weight in weights.items():
        module = import_module(f"fuzz.{name}")
        missing = getattr(module, "missing", lambda: None)()
        if missing is None:
            getattr(module, "prepare", lambda: None)()
            found[name] = (weight, module.call)
        else:
            print(f"without the leg {name}: {missing}")
    return found
