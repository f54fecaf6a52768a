"""O and LSE over all keys, from those over some at a time.

    LSE = log(exp(LSE_a) + exp(LSE_b))        O = exp(LSE_a - LSE) O_a + exp(LSE_b - LSE) O_b

with the larger of the two taken out of both exponentials. The sink belongs to no key: it is one
more term of the last sum, without a value.
"""

import torch
from torch import Tensor

from flash8.distributed.partial import columns, rows


class Merged:
    """The sums so far, in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        """out (rows, heads, head_dim_v) of zeros and lse (heads, rows) of -inf, which it keeps."""
        self.out, self.lse = out, lse

    def add(self, index: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """Adds what queries `index` (None: all, in order; no one twice) have found."""
        before, so_far = columns(self.lse, index), rows(self.out, index)
        total = torch.logaddexp(before, lse)
        merged = _weight(before, total) * so_far + _weight(lse, total) * out
        if index is None:
            self.out, self.lse = merged, total
        else:
            self.out.index_copy_(0, index, merged)
            self.lse.index_copy_(1, index, total)

    def finish(self, s_aux: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """O and LSE, once everything is added."""
        if s_aux is None:
            return self.out.to(dtype), self.lse
        total = torch.logaddexp(self.lse, s_aux.to(self.lse.dtype)[:, None])
        return (_weight(self.lse, total) * self.out).to(dtype), total


def sink_gradient(
    s_aux: Tensor, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """-sum over rows of exp(s_aux - LSE) * (rowsum(dO * O) - dLSE), (heads,)."""
    d = _row_dots(dout, out, lse)
    if dlse is not None:
        d = d - dlse
    return -(_sink_share(s_aux, lse) * d).sum(dim=1).to(s_aux.dtype)


def row_sums_of_ds(
    s_aux: Tensor | None, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """What a row of dS sums to over all keys, in exact arithmetic and without softcap, (heads,
    rows): dLSE + p_sink * (rowsum(dO * O) - dLSE)."""
    total = torch.zeros_like(lse) if dlse is None else dlse
    if s_aux is not None:
        total = total + _sink_share(s_aux, lse) * (_row_dots(dout, out, lse) - total)
    return torch.where(lse == float("-inf"), 0.0, total)


def _row_dots(dout: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """rowsum(dO * O), (heads, rows)."""
    if dout is None:
        return torch.zeros_like(lse)
    return (dout.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1).transpose(0, 1)


def _sink_share(s_aux: Tensor, lse: Tensor) -> Tensor:
    """exp(s_aux - LSE), 0 for a row that has seen nothing."""
    share = (s_aux.to(lse.dtype)[:, None] - lse).exp()
    return torch.where(lse == float("-inf"), 0.0, share)


def share(part: Tensor, total: Tensor) -> Tensor:
    """exp(part - total); 0 where nothing has been seen."""
    return (part - torch.where(total == float("-inf"), 0.0, total)).exp()


def _weight(part: Tensor, total: Tensor) -> Tensor:
    """The share for the rows of O, (rows, heads, 1)."""
    return share(part, total).transpose(0, 1)[..., None]
