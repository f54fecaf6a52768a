"""What is told when a model loads: that its attention is none that transformers' AttentionInterface
dispatches, or what flash8 is called there.
"""

import functools
import sys
from collections.abc import Iterator
from inspect import isclass
from types import ModuleType
from typing import Any

from torch import nn

_WRAPPED = "_flash8_refuses"
#: What users call flash8 before they know its name.
_OTHER_NAMES = ("flash8", "flash_8", "flash8_attention", "flash_attention_8")


def refuse_when_loaded(name: str) -> None:
    """Has transformers refuse `name` for a model class that would not use it, or while nothing is
    registered under it, and other names for flash8 always.

    Without this, such a model runs its own attention, or ends in a KeyError for the name. The check
    wraps `PreTrainedModel.get_correct_attn_implementation`, which every model goes through when it
    is made and when its implementation is set; other names pass as before.
    """
    from transformers import AttentionInterface, PreTrainedModel

    original = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        known = requested_attention in AttentionInterface().valid_keys()
        if not known and requested_attention in (name, *_OTHER_NAMES):
            raise ValueError(
                f"attn_implementation={requested_attention!r} is not registered; flash8 is what "
                f"flash8.integrations.transformers.register() returns: {name!r}"
            )
        if requested_attention == name and (reason := why_not_served(type(self), name)):
            raise ValueError(
                f"{type(self).__name__} {reason}, so attn_implementation={name!r} would not reach "
                "it; use attn_implementation='eager' (or 'sdpa', where it has that), or name the "
                f"parts that can use it: attn_implementation={{'text_config': {name!r}}}"
            )
        return original(self, requested_attention, *args, **kwargs)

    setattr(checked, _WRAPPED, True)
    PreTrainedModel.get_correct_attn_implementation = checked


def why_not_served(model: type, name: str) -> str | None:
    """What a class of models does instead of using AttentionInterface; None if it does use it.

    Judged by the modules that define the class and its bases: one that has attention layers either
    holds an AttentionInterface, or picks them from a table of classes, or computes attention.
    """
    for module in _modules(model):
        tables = [
            key
            for key, value in vars(module).items()
            if key.endswith("_ATTENTION_CLASSES") and isinstance(value, dict) and name not in value
        ]
        if tables:
            return f"picks its attention layers from a table of its own ({', '.join(tables)})"
        if _has_interface(module):
            return None
        if layers := _attention_layers(module):
            return f"computes attention by itself ({', '.join(layers)})"
    return None


def _modules(model: type) -> Iterator[ModuleType]:
    for base in model.__mro__:
        module = sys.modules.get(base.__module__)
        if issubclass(base, nn.Module) and base is not nn.Module and module is not None:
            yield module


def _has_interface(module: ModuleType) -> bool:
    from transformers import AttentionInterface

    return any(
        value is AttentionInterface or isinstance(value, AttentionInterface)
        for value in vars(module).values()
    )


def _attention_layers(module: ModuleType) -> list[str]:
    return [
        key
        for key, value in vars(module).items()
        if isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and "Attention" in key
        and "For" not in key
    ]
