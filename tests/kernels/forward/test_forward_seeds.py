"""Forward kernels of every family: no false alarm of the simulated device, the same bits by every
schedule.
"""

import pytest

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check, draw, masks, packed
from forward_launch import Call, Schedule
from fp8_forward_cases import dense_call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


def dense(variant: ForwardVariant, batch: int, *shape: int) -> Call:
    q, k, v = draw(variant, *shape, batch=batch)
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant))


def varlen(variant: ForwardVariant) -> Call:
    lengths_q, lengths_k = [130, 0, 65, 1], [200, 30, 0, 140]
    q, k, v = draw(variant, sum(lengths_q), sum(lengths_k), 2, 1)
    indices = {"cu_seqlens_q": packed(lengths_q), "cu_seqlens_k": packed(lengths_k)}
    given = {"indices": indices, "max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), **given)


CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal")
LOCAL = ForwardVariant("bf16", 64, 64, mask="local")
WIDE = ForwardVariant("fp16", 192, 192)
PAIR = ForwardVariant("bf16", 128, 128, cluster=True)
FP8 = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
FP8_V_COLMAJOR = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block", v_colmajor=True)
FORWARD = {
    "causal": (CAUSAL, dense(CAUSAL, 1, 193, 300, 2, 1), 2),
    "local": (LOCAL, dense(LOCAL, 1, 193, 300, 2, 1), 2),
    "wide": (WIDE, dense(WIDE, 1, 193, 300, 2, 1), 2),
    "varlen": (CAUSAL, varlen(CAUSAL), 3),
    "cluster": (PAIR, dense(PAIR, 1, 200, 400, 1, 1), 4),
    "fp8": (FP8, dense_call(FP8, 1, 193, 300, 2, 1), 2),
    "fp8, values v_colmajor": (FP8_V_COLMAJOR, dense_call(FP8_V_COLMAJOR, 1, 193, 300, 2, 1), 2),
}


def check_forward(name: str, seeds: int) -> None:
    variant, call, num_ctas = FORWARD[name]
    check(variant, call, Schedule(num_ctas=num_ctas), seeds=range(seeds))


def test_no_false_alarm_in_20_seeds():
    check_forward("causal", 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARD)
def test_no_false_alarm_in_200_seeds(name):
    check_forward(name, 200)
