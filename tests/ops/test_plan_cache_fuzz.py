"""Random calls, good and bad: no plan changes what a call does or how it fails."""

import random

import pytest
import torch

from flash8 import flash_attn_func, flash_attn_varlen_func
from plan_cache_cases import clear, draw, without_addresses

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore")

Q, K, V = draw(rows=16)
LENGTHS = torch.tensor([3, 16], dtype=torch.int32)
FEW = torch.tensor([0, 5, 16], dtype=torch.int32)
BUFFER = torch.zeros(2, *Q.shape).bfloat16()
#: Values that look alike, of which some options take some.
VALUES = {
    "q": [Q, Q.clone(), Q.half(), Q[:, ::2], BUFFER[0], Q.detach().requires_grad_(), None],
    "k": [K, K.clone(), K[:, :8], K.transpose(1, 2), torch.nn.Parameter(K)],
    "v": [V, V.half(), V[..., :64], V.to(torch.float8_e4m3fn)],
    "softmax_scale": [None, 1, 1.0, True, 0.0, -1.0, float("nan"), 2**70, "1"],
    "causal": [False, True, 0, 1, None],
    "window_size": [(-1, -1), (1, 0), (True, False), (1.0, 0), [1, 0], (1,), (1, 0, 0), None],
    "attention_chunk": [0, 1, True, False, 1.0, -1],
    "softcap": [0.0, 0, 1, 1.0, True, -0.0],
    "num_splits": [1, 0, True, 1.0, 2],
    "pack_gqa": [None, True, False, 1, 0],
    "deterministic": [False, True, 0],
    "sm_margin": [0, 1, True, -1, 0.0],
    "return_attn_probs": [False, True, 1, None],
    "s_aux": [None, torch.ones(4), torch.ones(8), torch.ones(4).half(), torch.ones(4).bfloat16()],
    "alibi_slopes": [None, torch.ones(4), torch.ones(8)[::2], torch.ones(4, requires_grad=True)],
    "dropout_p": [0.0, 0, False, 0.1],
    "out": [None, torch.empty_like(Q), BUFFER[1], Q, torch.empty_like(Q).requires_grad_()],
    "q_descale": [None, torch.ones(()), 1.0],
}
DENSE = {
    **VALUES,
    "qv": [None, torch.zeros_like(Q)],
    "dropout_seed": [None, 0, True],
}
VARLEN = {
    **VALUES,
    "cu_seqlens_q": [None, FEW, FEW.long()],
    "cu_seqlens_k": [None, FEW],
    "max_seqlen_q": [None, 16, 16.0, True],
    "max_seqlen_k": [None, 16, False],
    "seqused_q": [None, LENGTHS, LENGTHS.repeat_interleave(2)[::2], LENGTHS[:1]],
    "seqused_k": [None, LENGTHS, LENGTHS.long()],
}


def outcome(fake, function, arguments):
    """The exception that a call raises, or what it returns and launches, all but addresses."""
    launches = len(fake.launches)
    try:
        result = function(**arguments)
    except Exception as error:
        return type(error), str(error)
    tensors = result if isinstance(result, tuple) else (result,)
    kinds = [(x.shape, x.dtype, x.stride(), x.requires_grad) for x in tensors]
    new = range(launches, len(fake.launches))
    return kinds, [(fake.launches[i], without_addresses(fake.parameter(i))) for i in new]


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func])
@pytest.mark.parametrize("seed", range(3))
def test_no_plan_changes_a_call(seed, function, fake, on_fake_driver, misses):
    values = DENSE if function is flash_attn_func else VARLEN
    choose = random.Random(seed)
    calls = hits = 0
    for _ in range(60):
        good = {name: choices[0] for name, choices in values.items()}
        for name in choose.sample(sorted(values), 2):
            good[name] = choose.choice(values[name])
        outcome(fake, function, good)  # leaves a plan, if it is good
        for name in choose.sample(sorted(values), 4):
            arguments = {**good, name: choose.choice(values[name])}
            seen = len(misses)
            cached = [outcome(fake, function, arguments) for _ in range(2)]
            hits += len(misses) - seen < 2 and len(cached[1]) == 2
            clear()
            assert cached == [outcome(fake, function, arguments)] * 2, (good, name)
            calls += 1
    assert hits > calls / 4
