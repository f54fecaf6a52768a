"""The tiled PyTorch backend: forward and backward of everything, with memory linear in seqlen.

It is the backend of CPU tensors and the readable form of what the Hopper kernels compute: the
same loop over tiles, the same online softmax, the same roundings of P and dS.

A call is resolved into units (`sequences`), each of which has dense q, k and v of one length;
torch's compiled attention (`compiled`) serves those that it can (`grouped`), and `forward` and
`backward` walk over the tiles of the others. The two most common calls have shorter ways to torch's
attention: dense batches (`batch`), and packed sequences with as many keys as queries (`packed`).
"""

from flash8.backends.cpu.backward import backward
from flash8.backends.cpu.batch import backward_batch, forward_batch, forward_planned, plan_batch
from flash8.backends.cpu.cache import append_kv, check_slots
from flash8.backends.cpu.combine import combine, combine_backward, combine_jvp
from flash8.backends.cpu.compiled import Plan
from flash8.backends.cpu.forward import forward
from flash8.backends.cpu.forward_e4m3 import forward_e4m3
from flash8.backends.cpu.fp8_backward import fp8_backward
from flash8.backends.cpu.jvp import jvp
from flash8.backends.cpu.sequences import check_indices, check_tokens, check_values

__all__ = [
    "Plan",
    "append_kv",
    "backward",
    "backward_batch",
    "check_indices",
    "check_slots",
    "check_tokens",
    "check_values",
    "combine",
    "combine_backward",
    "combine_jvp",
    "forward",
    "forward_batch",
    "forward_e4m3",
    "forward_planned",
    "fp8_backward",
    "jvp",
    "plan_batch",
]
