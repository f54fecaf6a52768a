"""Calls of the CPU backend: shapes, groups of heads and every option."""

from cases import Case

OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(17, 9)),
    "left window": dict(window_size=(20, -1)),
    "right window": dict(window_size=(-1, 5)),
    "causal window": dict(causal=True, window_size=(31, 4)),
    "chunk": dict(attention_chunk=24),
    "causal chunk": dict(causal=True, attention_chunk=24),
    "softcap": dict(softcap=3.0, spread=2.0),
    "alibi": dict(alibi="h"),
    "alibi per batch": dict(alibi="bh", causal=True),
    "sink": dict(sink=True),
    "causal sink": dict(sink=True, causal=True),
    "qv": dict(qv=True),
    "scale": dict(softmax_scale=0.7),
    "everything": dict(
        causal=True, window_size=(40, 0), softcap=5.0, alibi="bh", sink=True, qv=True
    ),
}

# Longer than any tile a backend would choose for these head dims.
LONG = (270, 1100)

GROUPS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1)}


def case(seqlen_q=113, seqlen_k=203, batch=2, **changes) -> Case:
    return Case(seqlens_q=(seqlen_q,) * batch, seqlens_k=(seqlen_k,) * batch, **changes)
