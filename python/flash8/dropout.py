"""The mask of dropout as a tensor, for tests and for code that computes attention another way."""

import torch
from torch import Tensor

from flash8.call import checks
from flash8.tensors.arguments import require_int
from flash8.tensors.philox import keep_mask


def dropout_mask(
    seed: int | Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float
) -> Tensor:
    """The mask that the attention functions apply for `dropout_seed=seed` and `dropout_p=p`.

    Returns bool (batch, heads, seqlen_q, seqlen_k), True where the probability is kept, and
    scaled by 65536 / (65536 - round(65536 p)). Rows and columns count from the start of each
    sequence's used part.
    Raises TypeError or ValueError naming the argument that is wrong.
    """
    sizes = (("batch", batch), ("heads", heads), ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k))
    for name, size in sizes:
        require_int(name, size, minimum=0, maximum=2**31 - 1)
    checks.check_dropout_p(p)
    seed_value = int(checks.dropout_seed_tensor(seed, torch.device("cpu")).item())
    batch_heads = torch.arange(batch * heads).view(batch, heads)
    if seqlen_k == 0:
        return torch.empty(batch, heads, seqlen_q, 0, dtype=torch.bool)
    return keep_mask(seed_value, batch_heads, torch.arange(seqlen_q), (0, seqlen_k), p)
