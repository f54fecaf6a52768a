"""FP8 attention of a model, asked for in its configuration.

    config.f8_recipe = {"scaling": "current", "granularity": "head", "smooth_k": True}

Plain values, so that the recipe is saved and loaded with the configuration.
"""

from typing import Any

from flash8.fp8 import BlockScaling, CurrentScaling

#: The attribute of a configuration that holds the recipe.
CONFIG_ATTRIBUTE = "f8_recipe"

_RECIPES: dict[str, Any] = {"current": CurrentScaling, "block": BlockScaling}


def wants_fp8(config: Any) -> bool:
    return getattr(config, CONFIG_ATTRIBUTE, None) is not None


def recipe_of(config: Any) -> CurrentScaling | BlockScaling | None:
    """The recipe that a configuration asks for, or None.

    `scaling` is "current" or "block"; the other entries are fields of `flash8.fp8.CurrentScaling`
    or `flash8.fp8.BlockScaling`. DelayedScaling has state, which a configuration cannot hold.

    Raises:
        ValueError: the entries are not those of a recipe.
    """
    if not wants_fp8(config):
        return None
    given = getattr(config, CONFIG_ATTRIBUTE)
    if not isinstance(given, dict) or given.get("scaling") not in _RECIPES:
        raise ValueError(
            f'config.{CONFIG_ATTRIBUTE} must be a dict with "scaling" as one of '
            f"{sorted(_RECIPES)}, got {given!r}"
        )
    fields = {name: value for name, value in given.items() if name != "scaling"}
    try:
        recipe: CurrentScaling | BlockScaling = _RECIPES[given["scaling"]](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{CONFIG_ATTRIBUTE} is no recipe: {error}") from error
    return recipe
