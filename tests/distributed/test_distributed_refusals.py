"""What flash8.distributed refuses: the argument, its value and what is supported are named."""

import re

import pytest
import torch

from flash8 import distributed
from flash8.distributed.ulysses import shares
from flash8.fp8 import BlockScaling, CurrentScaling
from process_group import Processes

CU = torch.tensor([0, 5, 12], dtype=torch.int32)
ROWS = torch.zeros(12, 3)


@pytest.fixture(scope="module")
def processes():
    started = Processes(1)
    yield started
    started.close()


def packed(rows=12, heads=2, **given):
    x = torch.zeros(rows, heads, 8)
    return {"q": x, "k": x, "v": x, "cu_seqlens": CU, **given}


def dense(**given):
    x = torch.zeros(2, 6, 2, 8)
    return {"q": x, "k": x, "v": x, **given}


REFUSED = {
    "method": (packed(method="pass"), ValueError, r"method must be one of \(.*\), got 'pass'"),
    "layout": (packed(layout="striped"), ValueError, r"layout must be .*zigzag.*, got 'striped'"),
    "group": (
        packed(group=3),
        TypeError,
        r"group must be a torch\.distributed\.ProcessGroup.*got 3",
    ),
    "rows": (packed(rows=11), ValueError, r"q must have 12 tokens: .*rank 0 of 1.*\(11, 2, 8\)"),
    "pair": (packed(method="ulysses+ring"), ValueError, r"group must be a pair .*'ulysses\+ring'"),
    "recipe": (packed(recipe=8), TypeError, r"recipe must be a flash8\.fp8 CurrentScaling.*got 8"),
    "recipe and ring": (
        packed(recipe=CurrentScaling(backward="fp8"), method="ring"),
        ValueError,
        r"recipe\.backward must be '16bit' with method='ring', got 'fp8'",
    ),
    "block recipe and both": (
        packed(recipe=BlockScaling(), method="ulysses+ring", group="pair"),
        ValueError,
        r"recipe must not scale by 128 tokens with method='ulysses\+ring', got BlockScaling",
    ),
    "seqlen": (dense(seqlen=7), ValueError, r"q must have 7 tokens a sequence: .*seqlen=7"),
    "seqlen type": (dense(seqlen=7.0), TypeError, r"seqlen must be an integer, got 7\.0"),
    "seqlen of packed": (packed(seqlen=99), ValueError, r"seqlen must be None with .*, got 99"),
    "cu_seqlens type": (
        packed(cu_seqlens=[0, 12]),
        TypeError,
        r"cu_seqlens must be a torch\.Tensor",
    ),
    "cu_seqlens data": (
        packed(cu_seqlens=torch.tensor([0, 13, 12])),
        ValueError,
        r"cu_seqlens must start at 0, never decrease.*\[0, 13, 12\]",
    ),
    "cu_seqlens start": (packed(cu_seqlens=torch.tensor([1, 12])), ValueError, r"must start at 0"),
    "packed q": (dense(cu_seqlens=CU), ValueError, r"q must have 3 dimensions"),
    "window": (packed(window_size=(1,)), TypeError, r"window_size must be a pair"),
    "softcap": (packed(softcap=-1.0), ValueError, r"softcap must be 0 \(off\) or at least"),
    "s_aux": (packed(s_aux=torch.zeros(3)), ValueError, r"s_aux must have shape \(heads,\)"),
    "float8": (
        {
            **packed(),
            **{name: torch.zeros(12, 2, 8).to(torch.float8_e4m3fn) for name in ("q", "k", "v")},
        },
        TypeError,
        r"q must be bf16, fp16, fp32 or fp64, got torch.float8_e4m3fn",
    ),
    "return_attn_probs": (
        packed(return_attn_probs=1),
        TypeError,
        r"return_attn_probs must be a bool",
    ),
}


def message_of(function, kinds, **given):
    try:
        function(**given)
    except kinds as error:
        return type(error), str(error)
    return None, "nothing was raised"


def refuse(group, given):
    if given.get("group") == "pair":
        given = {**given, "group": (group, group)}
    return message_of(distributed.attention, Exception, **{"group": group, **given})


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_is_refused(processes, name):
    given, kind, text = REFUSED[name]
    ((found, message),) = processes.run(refuse, 1, given)
    assert found is kind, message
    assert re.search(text, message), message


SHARDS = [
    (distributed.shard, dict(x=ROWS, cu_seqlens=CU[:2]), "x must have the 5 tokens of cu_seqlens"),
    (distributed.shard, dict(x=ROWS[0]), r"x must be (batch, seqlen, ...)"),
    (distributed.shard, dict(x=[1]), "x must be a torch.Tensor"),
    (distributed.unshard, dict(x=ROWS[1:], cu_seqlens=CU), "x must have 12 tokens"),
    (distributed.unshard, dict(x=ROWS, cu_seqlens=CU, seqlen=9), "seqlen must be None with cu_seq"),
    (distributed.unshard, dict(x=ROWS, layout="none"), "layout must be one of"),
]


def refuse_shards(group):
    return [
        message_of(function, (TypeError, ValueError), group=group, **given)[1]
        for function, given, _ in SHARDS
    ]


def test_shards_are_refused(processes):
    (messages,) = processes.run(refuse_shards, 1)
    for message, (_, _, text) in zip(messages, SHARDS, strict=True):
        assert text in message


def test_heads_that_ranks_cannot_share_are_refused():
    assert shares(8, 2, 4) == ([(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)])
    assert shares(8, 4, 2)[1] == [(0, 2), (2, 4)]
    for heads, heads_kv, ranks in ((6, 3, 4), (12, 3, 2), (6, 6, 4)):
        with pytest.raises(ValueError, match=f"the {ranks} ranks .* got {heads} and {heads_kv}"):
            shares(heads, heads_kv, ranks)
