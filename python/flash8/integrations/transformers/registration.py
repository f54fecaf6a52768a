"""Entering flash8 into the registries of transformers."""

from flash8.integrations.transformers import continuous
from flash8.integrations.transformers.attention import attend
from flash8.integrations.transformers.own_attention import refuse_when_loaded

#: The value of `attn_implementation`.
ATTENTION_NAME = "f8_attention"

_OLDEST = (5, 23)  # the oldest release that is tested
_NEEDS = "flash8.integrations.transformers needs transformers 5.23 or newer"


def register() -> str:
    """Makes flash8 known to transformers and returns its `attn_implementation` name.

    Every later `from_pretrained`, `from_config` and `model.set_attn_implementation` accepts the
    name, unless the model's attention is none that transformers dispatches. May be called again.

    Raises:
        ImportError: transformers is missing or older than 5.23.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{_NEEDS}; pip install 'flash8[transformers]'") from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ImportError(f"{_NEEDS}, found {transformers.__version__}")
    from flash8.integrations.transformers.masks import make_mask

    refuse_when_loaded(ATTENTION_NAME)
    transformers.AttentionInterface.register(ATTENTION_NAME, attend)
    transformers.AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
    continuous.enter(ATTENTION_NAME)
    return ATTENTION_NAME
