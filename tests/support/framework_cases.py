"""The imports of frameworks, as read in August 2026, and tensors for calls in their shapes."""

import inspect

import torch

IMPORTS = {
    "Megatron-LM": """
        import flash_attn as fa
        from flash_attn import flash_attn_func as _impl
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
        from flash_attn.layers.rotary import apply_rotary_emb as apply_rotary_emb_flash
        from flash_attn_3.flash_attn_interface import _flash_attn_forward
        from flash_attn_3.flash_attn_interface import (
            flash_attn_with_kvcache as flash_attn3_with_kvcache,
        )
    """,
    "TransformerEngine": """
        from flash_attn_2_cuda import varlen_bwd as flash_attn_cuda_bwd
        from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func
        from flash_attn.flash_attn_interface import _flash_attn_forward as _flash_attn_fwd
        from flash_attn.flash_attn_interface import _flash_attn_backward as _flash_attn_bwd
        from flash_attn.flash_attn_interface import (
            _flash_attn_varlen_forward as _flash_attn_varlen_fwd,
        )
        from flash_attn.flash_attn_interface import (
            _flash_attn_varlen_backward as _flash_attn_varlen_bwd,
        )
        from flash_attn_interface import flash_attn_func as flash_attn_func_v3
        from flash_attn_interface import (
            flash_attn_varlen_func as flash_attn_varlen_func_v3,
        )
        from flash_attn_interface import (
            flash_attn_with_kvcache as flash_attn_with_kvcache_v3,
        )
        from flash_attn_interface import _flash_attn_forward as _flash_attn_fwd_v3
        from flash_attn_interface import _flash_attn_backward as _flash_attn_bwd_v3
    """,
    "ring-flash-attention": """
        from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_backward
        from flash_attn.flash_attn_interface import (
            _flash_attn_varlen_forward,
            _flash_attn_varlen_backward,
        )
        from flash_attn import flash_attn_qkvpacked_func, flash_attn_kvpacked_func
        from flash_attn import flash_attn_varlen_qkvpacked_func
        from flash_attn import flash_attn_varlen_kvpacked_func
    """,
    "OLMo-core": """
        import flash_attn as flash_attn_2
        import flash_attn_3.flash_attn_interface as flash_attn_3
        from flash_attn.ops.triton.layer_norm import rms_norm_fn
        from flash_attn.layers.rotary import apply_rotary_emb_qkv_
    """,
    "OLMo-core, of a build that has the module alone": """
        import flash_attn_interface as flash_attn_3
    """,
    "DeepSpeed": """
        import flash_attn
        from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_backward
    """,
    "transformers": """
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn_interface import flash_attn_func as fa3_func
        from flash_attn_interface import flash_attn_varlen_func, flash_attn_with_kvcache
    """,
}


def imported(framework):
    """The names that the framework's imports bind."""
    names = {}
    exec(inspect.cleandoc(IMPORTS[framework]), names)
    return names


BATCH, SEQLEN, HEADS, HEADS_KV, DIM = 2, 12, 4, 2, 16
CU_SEQLENS = torch.tensor([0, 8, 24], dtype=torch.int32)


def dense():
    shapes = [(BATCH, SEQLEN, heads, DIM) for heads in (HEADS, HEADS_KV, HEADS_KV, HEADS)]
    return [torch.randn(shape) for shape in shapes]


def packed():
    shapes = [(24, heads, DIM) for heads in (HEADS, HEADS_KV, HEADS_KV, HEADS)]
    return [torch.randn(shape) for shape in shapes]


def whole(function, q, k, v, dout, **options):
    """(O, LSE, dq, dk, dv) of one call of flash8."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves, return_attn_probs=True, **options)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
