"""Cross entropy of each token, by torch's, and the square of the log-sum-exp (z loss)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(losses, z_losses), fp32 (tokens,); the losses hold the z losses, which have no gradient.

    Args:
        logits: (tokens, vocabulary).
        labels: (tokens,); ignore_index makes both losses 0.
        logit_scale: factor of the logits.
        lse_square_scale: the z loss is this times the square of the log-sum-exp.
        precomputed_lse, inplace_backward: save time and memory there; without effect here.
        process_group: None. A vocabulary that is split over processes is not supported.
    """
    if process_group is not None:
        raise NotImplementedError(
            "process_group (a vocabulary split over processes) is not supported by flash8.compat; "
            "torch.distributed.tensor.parallel.loss_parallel does it"
        )
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    labels = labels.long()
    losses = F.cross_entropy(
        scaled,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if lse_square_scale == 0.0:
        return losses, torch.zeros_like(losses)
    z_losses = lse_square_scale * scaled.logsumexp(-1).square()
    z_losses = z_losses.masked_fill(labels == ignore_index, 0.0)
    return losses + z_losses, z_losses.detach()
