"""Names, order and defaults are FlashAttention-3's, so that users switch by an import."""

import inspect
import typing

import pytest

import flash8
from flash8 import attention
from flash8.call.options import Options

REQUIRED = inspect.Parameter.empty
DESCALES = [("q_descale", None), ("k_descale", None), ("v_descale", None)]
MASKING = [("window_size", (-1, -1)), ("attention_chunk", 0), ("softcap", 0.0)]
SCHEDULING = [("num_splits", 1), ("pack_gqa", None), ("deterministic", False), ("sm_margin", 0)]
TAIL = [("softmax_scale", None), ("causal", False), ("qv", None), *DESCALES, *MASKING, *SCHEDULING]
TAIL += [("return_attn_probs", False)]
PACKED_TAIL = [("softmax_scale", None), ("causal", False), *DESCALES, *MASKING]
PACKED_TAIL += [("deterministic", False), ("num_heads_q", None), ("sm_margin", 0)]
PACKED_TAIL += [("return_attn_probs", False)]


def required(*names):
    return [(name, REQUIRED) for name in names]


LENGTHS = required("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
FA3 = {
    "flash_attn_func": required("q", "k", "v") + TAIL,
    "flash_attn_varlen_func": required("q", "k", "v")
    + LENGTHS
    + [("seqused_q", None), ("seqused_k", None)]
    + TAIL,
    "flash_attn_qkvpacked_func": required("qkv") + PACKED_TAIL,
    "flash_attn_with_kvcache": required("q", "k_cache", "v_cache")
    + [(n, None) for n in ("k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens")]
    + [(n, None) for n in ("cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q")]
    + [(n, None) for n in ("cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens")]
    + [*DESCALES, ("softmax_scale", None), ("causal", False), *MASKING]
    + [("rotary_interleaved", True), ("scheduler_metadata", None), ("num_splits", 0)]
    + [("pack_gqa", None), ("sm_margin", 0), ("return_softmax_lse", False)],
    "flash_attn_combine": [
        *required("out_partial", "lse_partial"),
        ("out", None),
        ("out_dtype", None),
    ],
}
SIZES = ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim")
METADATA_NAMES = [
    *SIZES,
    *("cache_seqlens", "qkv_dtype", "headdim_v", "cu_seqlens_q", "cu_seqlens_k_new"),
    *("cache_leftpad", "page_size", "max_seqlen_k_new", "causal", "window_size"),
    *("attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin"),
]
OWN = {
    "flash_attn_varlen_qkvpacked_func": required("qkv", "cu_seqlens", "max_seqlen") + PACKED_TAIL,
    "flash_attn_kvpacked_func": required("q", "kv") + [x for x in TAIL if x[0] != "qv"],
    "flash_attn_varlen_kvpacked_func": required("q", "kv")
    + LENGTHS
    + [("seqused_q", None), ("seqused_k", None)]
    + [x for x in TAIL if x[0] != "qv"],
}
KEYWORDS = {"s_aux", "alibi_slopes", "dropout_p", "dropout_seed", "out"}
MEANS = {"k_mean", "v_mean"}
NORMS = {"q_norm_weight", "k_norm_weight", "norm_eps"}
CHANNELS = MEANS | {"v_channel_descale", "smooth_k"}
KEYWORD_ONLY = {
    "flash_attn_func": KEYWORDS | CHANNELS,
    "flash_attn_varlen_func": KEYWORDS | CHANNELS | {"page_table"},
    "flash_attn_qkvpacked_func": KEYWORDS,
    "flash_attn_varlen_qkvpacked_func": KEYWORDS,
    "flash_attn_kvpacked_func": KEYWORDS,
    "flash_attn_varlen_kvpacked_func": KEYWORDS,
    "flash_attn_with_kvcache": {"s_aux", "alibi_slopes", "out"} | MEANS | NORMS,
    "flash_attn_combine": set(),
}


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_every_argument_is_the_option_of_its_name(name, monkeypatch):
    """They are handed on by name, all of them."""
    seen = []
    monkeypatch.setattr(attention, "attend", lambda *args, **others: seen.append((args, others)))
    names = inspect.signature(getattr(flash8, name)).parameters
    getattr(flash8, name)(**{x: f"<{x}>" for x in names})
    (((arguments,), others),) = seen
    assert others == {"dropout_seed": "<dropout_seed>", "return_lse": "<return_attn_probs>"}
    assert arguments == {
        x: f"<{x}>" for x in names if x not in ("dropout_seed", "return_attn_probs")
    }
    options = Options.of(arguments)
    assert all(getattr(options, x) == arguments[x] for x in arguments if x in Options._fields)


def parameters(name):
    return inspect.signature(getattr(flash8, name)).parameters.values()


def positional(name):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return [(p.name, p.default) for p in parameters(name) if p.kind in kinds]


@pytest.mark.parametrize("name", [*FA3, *OWN])
def test_positional_order_and_defaults(name):
    assert positional(name) == {**FA3, **OWN}[name]


def keyword_only(name):
    """Names that work only as keywords; `**extras: Unpack[SomeTypedDict]` counts as its keys."""
    names = set()
    for p in parameters(name):
        if p.kind is inspect.Parameter.KEYWORD_ONLY:
            assert p.default in (None, 0.0) or p.name == "norm_eps"  # of norms that are given
            names.add(p.name)
        elif p.kind is inspect.Parameter.VAR_KEYWORD:
            (typed_dict,) = typing.get_args(p.annotation)
            assert not typed_dict.__required_keys__
            names |= set(typed_dict.__annotations__)
    return names


@pytest.mark.parametrize("name", KEYWORD_ONLY)
def test_everything_else_is_keyword_only_with_a_default(name):
    assert keyword_only(name) >= KEYWORD_ONLY[name]


@pytest.mark.parametrize("name", KEYWORD_ONLY)
def test_an_unknown_keyword_is_a_type_error(name):
    arguments = [None for _, default in positional(name) if default is REQUIRED]
    with pytest.raises(TypeError):
        getattr(flash8, name)(*arguments, no_such_option=1)


def test_get_scheduler_metadata():
    found = positional("get_scheduler_metadata")
    assert [name for name, _ in found] == METADATA_NAMES
    defaults = dict(found)
    assert all(defaults[name] is REQUIRED for name in (*SIZES, "cache_seqlens"))
    assert defaults["num_splits"] == 0 and defaults["window_size"] == (-1, -1)
    assert defaults["has_softcap"] is False and defaults["max_seqlen_k_new"] == 0


def test_public_names():
    for name in [*KEYWORD_ONLY, "get_scheduler_metadata", "dropout_mask"]:
        assert name in flash8.__all__
        assert inspect.getdoc(getattr(flash8, name)), f"{name} has no docstring"
