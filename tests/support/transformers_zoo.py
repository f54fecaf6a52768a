"""Tiny random models of every family that the installed transformers has, without a download."""

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 60  # tokens that are used, below every vocabulary here

#: What configurations call their sizes. Fields that a configuration does not have are left out.
SIZES = dict(
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "width", "hidden_size_global"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "expert_ffn_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 5),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head"), 16),
    mamba_expand=2,
    image_size=16,
    patch_size=8,
    hidden_size_per_layer_input=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    dropout=0.0,
    attention_dropout=0.0,
)
#: What single families need beside that.
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]))
PARTICULARS = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), MROPE),
    **dict.fromkeys(("paddleocr_vl_text", "glm4v_text", "glm46v_text"), MROPE),
    **dict.fromkeys(("glm4v_moe_text", "glm_ocr_text", "hunyuan_vl_text"), MROPE),
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=64),
    "cohere_compass_text": dict(
        layer_types=["full_attention"] * 2,
        rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4)),
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "dots1": dict(first_k_dense_replace=1, n_shared_experts=1),
    "dots3_note_text": dict(num_key_value_heads=4),
    "esmc": dict(num_key_value_heads=4),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=5),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8),
    "nemotron_h": dict(n_groups=1, layers_block_type=["mamba", "attention"]),
    "minimax_m3_vl_text": dict(
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=1,
    ),
    "neomme": dict(head_dim=16, hidden_size=64),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        mamba_d_state=8,
        n_mamba_heads=2,
    ),
    "zamba2": dict(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        n_mamba_heads=4,
        use_mem_rope=True,
    ),
    "zaya": dict(num_experts_per_tok=1),
}
#: kind: (the families and their classes, the class that makes them)
KINDS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
    "seq2seq": (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM",
    ),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM"),
    "multimodal": (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForImageTextToText",
    ),
}
LARGEST = 20_000_000  # parameters; what cannot be made smaller is left out


class NotBuiltError(Exception):
    """A family that has no tiny model here, and why."""


def families(kind):
    return list(KINDS[kind][0])


def tiny_config(config_class, *, decoder=False):
    names = {f.name for f in dataclasses.fields(config_class)}
    given = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:
        given["num_key_value_heads"] = 4
    if decoder and "is_decoder" in names:
        given["is_decoder"] = True
    given |= _tiny_parts(config_class)
    given |= PARTICULARS.get(config_class.model_type, {})
    config = config_class(**copy.deepcopy(given))
    types = getattr(config, "layer_types", None)
    if "layer_types" in names and types and not any(map(_is_attention, types)):
        with contextlib.suppress(Exception):  # types of other names
            given["layer_types"] = [*types[:-1], "full_attention"]
            config = config_class(**copy.deepcopy(given))
    return config


def _is_attention(layer_type):
    words = ("attention", "hybrid")
    return any(word in layer_type for word in words) and "linear" not in layer_type


def _tiny_parts(config_class):
    """The configurations inside a configuration: of the text model, of the vision tower."""
    parts, classes = {}, getattr(config_class, "sub_configs", None) or {}
    default = None
    for name, part in classes.items():
        if part.__name__ == "AutoConfig":
            default = default or config_class()
            part = type(getattr(default, name, None))
        if dataclasses.is_dataclass(part):
            parts[name] = tiny_config(part)
    return parts


def new_model(kind, family, implementation):
    """A model in float32 whose weights depend on the family alone.

    Raises:
        NotBuiltError: the sizes do not fit this family, or it needs a package that is missing.
    """
    auto = getattr(transformers, KINDS[kind][1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = tiny_config(CONFIG_MAPPING[family], decoder=kind == "causal")
            with torch.device("meta"):
                model = auto.from_config(copy.deepcopy(config))
        except Exception as error:
            raise NotBuiltError(f"{type(error).__name__}: {error}") from error
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > LARGEST:
            raise NotBuiltError(f"{parameters} parameters")
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # away from initial zeros and ones
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def set_implementation(model, implementation):
    """What a user does who sets it past transformers' checks: in every configuration."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = implementation


@contextlib.contextmanager
def count_calls(name):
    """Counts the attention calls that reach the function registered as `name`, in `calls`."""
    table = transformers.AttentionInterface._global_mapping
    real, calls = table[name], Counter()

    def counting(*args, **kwargs):
        calls["all"] += 1
        calls["position_ids"] += kwargs.get("position_ids") is not None
        calls["boundaries"] += kwargs.get("cu_seq_lens_q") is not None
        return real(*args, **kwargs)

    table[name] = counting
    try:
        yield calls
    finally:
        table[name] = real
