"""Hugging Face transformers (5.x) models on flash8.

    from flash8.integrations import transformers as flash8_transformers

    model = AutoModelForCausalLM.from_pretrained(
        ..., attn_implementation=flash8_transformers.register()
    )

Two public registries are used, `AttentionInterface` and `AttentionMaskInterface`. Three functions
are wrapped: one so that models with an attention of their own are refused when they load
(`own_attention`), two so that continuous batching takes flash8 (`continuous`).
The name of the implementation avoids the word "flash": transformers takes every name that contains
it for a FlashAttention package of its own and looks for that on the hub.

How a call goes: the model asks for a mask, and `masks.make_mask` answers with a `layouts` object
that says where sequences begin and end, never with None or a (seqlen x seqlen) tensor. Each layer
hands that object to `attention.attend`, which adds the packed sequences that it is told of
(`packing`) and calls the flash8 function that fits. A model that uses the object itself gets an
error (`opaque`).
"""

import sys

from flash8.integrations.transformers.own_attention import refuse_when_loaded
from flash8.integrations.transformers.registration import ATTENTION_NAME, register

if "transformers.modeling_utils" in sys.modules:
    refuse_when_loaded(ATTENTION_NAME)  # so that a name which is not registered gets a hint

__all__ = ["ATTENTION_NAME", "register"]
