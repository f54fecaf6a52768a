"""The two 8-bit floating point types, and the one way this package casts to them."""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
#: The largest finite values.
MAX = {E4M3: 448.0, E5M2: 57344.0}


def saturating_cast(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x rounded to nearest even; beyond the range the largest finite value, NaN stays NaN.

    What `cvt.rn.satfinite` does. The clamp is explicit: a plain cast overflows differently from
    one release of PyTorch, and from one of the two types, to the next.
    """
    limit = MAX[dtype]
    return x.clamp(-limit, limit).to(dtype)
