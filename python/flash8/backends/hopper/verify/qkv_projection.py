"""A QKV projection against its parts in fp64: dense and packed sequences, norms, both rotations."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash8.backends.hopper import qkv_projection as hopper
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.qkv_variants import HEAD_DIM, QkvVariant
from flash8.backends.hopper.verify import gemm
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.qkv_projection import Projection
from flash8.call.split_k import multiprocessors
from flash8.tensors.descales import BLOCK
from flash8.tensors.float8 import E4M3, MAX
from flash8.tensors.rms_norm import Norm, rms_norm
from flash8.tensors.rotary import Rope, embed_position
from flash8.tensors.tokens import Tokens
from flash8.tensors.v_colmajor import from_colmajor, to_colmajor

#: What the product's 14 bits lose of a value, relative to the largest one of the block. A product,
#: a turn or a factor that is wrong is far more.
_TOLERANCE = 2.0**-7
_ROUNDING = 2.0**-4  # of e4m3
_NAMES = ("q", "k", "v")


def find_fault(variant: QkvVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for projection in Draw(variant, device).projections():
        fault = find_fault_of(variant, projection)
        if fault is not None:
            return fault
    return None


def find_fault_of(variant: QkvVariant, projection: Projection) -> str | None:
    """What is wrong with the kernel's outputs for this projection, or None."""
    watchdog = Watchdog(projection.a.device)
    found = hopper.launch(variant, projection)
    watchdog.wait()
    tokens = Tokens(projection.cu_seqlens, projection.seqused)
    wanted = _reference(projection)
    for name, data, descale, want in zip(_NAMES, found[::2], found[1::2], wanted, strict=True):
        amax = tokens.finite_amax(want, "block")
        expected = torch.where(amax == 0.0, 1.0, amax / MAX[E4M3])
        count = int((~((descale / expected - 1.0).abs() <= _TOLERANCE)).sum())
        if count:
            return f"{count} of {descale.numel()} descales of {name} differ"
        if name == "v":
            count = int((data.view(torch.uint8)[~_places(want, tokens)] != 0).sum())
            if count:
                return f"{count} keys of v that do not count are not zero"
            data = from_colmajor(data, want.shape[-3], Tokens(projection.cu_seqlens))
        count = int(_differ(data, descale, want, tokens).sum())
        if count:
            return f"{count} of {data.numel()} elements of {name} differ"
    return None


def _places(want: Tensor, tokens: Tokens) -> Tensor:
    """Where column-major V holds a key that counts."""
    ones = torch.ones_like(want, dtype=torch.float32).to(E4M3)
    return to_colmajor(ones, tokens).view(torch.uint8) != 0


def _differ(data: Tensor, descale: Tensor, want: Tensor, tokens: Tokens) -> Tensor:
    """Which elements are none that a sound kernel may write. Those that do not count are."""
    of_token = tokens.spread_descale(descale, want).double()
    bound = _ROUNDING * want.abs() + _TOLERANCE * MAX[E4M3] * of_token
    wrong = ~((data.float().double() * of_token - want).abs() <= bound)  # NaN is wrong
    used = tokens.used(want)
    return wrong if used is None else wrong & used[..., None, None]


def _reference(projection: Projection) -> list[Tensor]:
    """q, k and v in fp64."""
    p = projection
    product, _ = gemm.reference(p.product)
    x = product.view(*p.a.shape[:-1], -1, HEAD_DIM)
    q, k, v = x.split((p.heads_q, p.heads_kv, p.heads_kv), dim=-2)
    found = []
    for y, norm in ((q, p.q_norm), (k, p.k_norm)):
        y = y if norm is None else rms_norm(y, norm)
        found.append(y if p.rope is None else embed_position(y, p.rope, p.batch, p.cu_seqlens))
    return [*found, v]


class Draw(gemm.Draw):
    """Random projections for a variant."""

    def __init__(self, variant: QkvVariant, device: torch.device) -> None:
        super().__init__(GemmVariant(variant.scales, BLOCK, HEAD_DIM), device)

    def projections(self) -> Iterator[Projection]:
        """More K than stages hold; packed sequences of no token, of one and of several blocks, and
        tokens of no sequence; positions beyond the tables. On a GPU CTAs that go on to a second
        tile."""
        halves = self._rope(HEAD_DIM, False, [3, 0])
        yield self._projection((2, 150), 1168, (2, 1), rope=halves, seqused=[150, 70])
        cu_seqlens = [0, 0, 130, 131, 131, 420]
        turned = self._rope(96, True, [7, 0, 350, 2, 90])
        yield self._projection((429,), 272, (2, 2), rope=turned, norms=True, cu_seqlens=cu_seqlens)
        yield self._projection((1, 5), 16, (1, 1), norms=True, rope=self._rope(HEAD_DIM, True, [0]))
        if self.device.type == "cuda":
            yield self.of_more_blocks(multiprocessors(self.device))

    def of_more_blocks(self, count: int) -> Projection:
        """One of more tiles than `count`, of six heads."""
        seqlen = BLOCK * (count // 12 + 1) - 40
        rope = self._rope(HEAD_DIM, False, [0, 0])
        return self._projection((2, seqlen), 144, (4, 1), rope=rope)

    def _projection(
        self,
        tokens: tuple[int, ...],
        k: int,
        heads: tuple[int, int],
        *,
        rope: Rope,
        norms: bool = False,
        cu_seqlens: list[int] | None = None,
        seqused: list[int] | None = None,
    ) -> Projection:
        n = (heads[0] + 2 * heads[1]) * HEAD_DIM
        rows = torch.Size(tokens).numel()
        bias = torch.bfloat16 if norms else None
        product = self._product(rows, n, k, torch.float32, bias)
        q_norm, k_norm = (Norm(self.normal(HEAD_DIM), 1e-6) if norms else None for _ in range(2))
        return Projection(
            product.a.view(*tokens, k),
            product.b,
            product.given_scale_a,
            product.scale_b,
            product.bias,
            *heads,
            rope,
            q_norm,
            k_norm,
            None if cu_seqlens is None else self._index(cu_seqlens),
            None if seqused is None else self._index(seqused),
        )

    def _rope(self, rotary_dim: int, interleaved: bool, offsets: list[int]) -> Rope:
        angles = self.normal(400, rotary_dim // 2) * 3.0
        return Rope(angles.cos(), angles.sin(), self._index(offsets), interleaved)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device)
