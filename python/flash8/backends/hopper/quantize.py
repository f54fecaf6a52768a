"""The quantizer on compiled kernels (cutlass_kernels/quantize): which launches a call takes.

    mean, mean_finish    where a mean is to be subtracted that is not given
    amax                 where the amax of a whole tensor or head must be known before the cast
    cast                 always, and the only one for descales per block or page, or given

Each pass but mean_finish reads x once; the cast writes the result once.
"""

import functools

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import kernels, streams
from flash8.backends.hopper.quantize_variants import (
    TILE_HEAD_DIMS,
    Input,
    Job,
    Output,
    QuantizeVariant,
    tile_head_dim,
)
from flash8.call.request import Request
from flash8.tensors.arguments import to_int32
from flash8.tensors.descales import BLOCK
from flash8.tensors.float8 import E4M3
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rotary import Rope

_DTYPES: dict[torch.dtype, Input] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
_CHANNELS = 16  # of a thread
_FROM_TILE, _FROM_AMAX, _GIVEN = range(3)  # ScaleSource


def refusal(request: Request) -> str | None:
    """Why no quantizer kernel serves this call, or None."""
    if request.x.numel() == 0 or request.batch == 0:
        return "there is nothing to quantize"
    if request.granularity == "channel":
        return "granularity 'channel' has no quantizer kernel"
    return refusal_of(request.x, request.rope)


def refusal_of(x: Tensor, rope: Rope | None) -> str | None:
    """Why no quantizer kernel takes such an x, or None."""
    if x.dtype not in _DTYPES:
        return f"there is no quantizer kernel for {x.dtype}"
    if x.shape[-1] % _CHANNELS != 0 or x.shape[-1] > TILE_HEAD_DIMS[-1]:
        return (
            f"head_dim is {x.shape[-1]}; quantizer kernels take multiples of {_CHANNELS} up to "
            f"{TILE_HEAD_DIMS[-1]}"
        )
    if rope is not None:
        rotary_dim = 2 * rope.cos.shape[1]
        # Pairs that lie apart are exchanged between threads.
        unit = _CHANNELS if rope.interleaved else 2 * _CHANNELS
        if rotary_dim % unit != 0:
            return f"rotary_dim is {rotary_dim}, which is not a multiple of {unit}"
    return None


def jobs(request: Request) -> tuple[Job, ...]:
    """The launches of a call, in their order."""
    found: list[Job] = ["mean", "mean_finish"] if request.smooth else []
    if _scale_source(request) == _FROM_AMAX:
        found.append("amax")
    return (*found, "cast")


def _scale_source(request: Request) -> int:
    if request.descale is not None:
        return _GIVEN
    one_tile = request.granularity == "page" and request.x.shape[1] <= BLOCK
    return _FROM_TILE if request.granularity == "block" or one_tile else _FROM_AMAX


def partial_mean_shape(request: Request) -> torch.Size:
    """(tiles, 2, head_dim): the sums of a tile, and how many values were finite."""
    heads, width = request.x.shape[-2:]
    sequences = 1 if request.packed else request.batch
    return torch.Size((request.blocks * sequences * heads, 2, width))


def quantize(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Data, descale (empty if given) and mean (`Request.mean_shape`), on x's stream."""
    call = Call(request)
    call.launch()
    return call.data, call.descale, call.mean


def variants(request: Request) -> list[QuantizeVariant]:
    """The kernels that a call takes."""
    return [_variant_of(request, job) for job in jobs(request)]


def _variant_of(request: Request, job: Job) -> QuantizeVariant:
    x = request.x
    if job != "cast":
        return variant_for(job, x)
    return variant_for(job, x, "e4m3" if request.dtype == E4M3 else "e5m2", request.v_colmajor)


def variant_for(
    job: Job, x: Tensor, out: Output = "e4m3", v_colmajor: bool = False
) -> QuantizeVariant:
    """The kernel that does this job for an x of this type and head dimension."""
    dtype = "fp32" if job == "mean_finish" else _DTYPES[x.dtype]
    return _variant(job, dtype, tile_head_dim(x.shape[-1]), out, v_colmajor)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor that kernels fill."""
    return torch.empty(shape, dtype=dtype, device=like.device)


class Launcher:
    """Parameters for the quantizer kernels, and the tensors that they point to."""

    def __init__(self, x: Tensor, rope: Rope | None, **indices: Tensor | None) -> None:
        """indices: cu_seqlens and seqused."""
        self.params = params = _native.QuantizeParams()
        self.x, params.x = aligned(x)
        self._kept = [self.x]
        params.heads, params.head_dim = x.shape[-2:]
        cu_seqlens = indices["cu_seqlens"]
        if cu_seqlens is None:
            params.batch, params.seqlen = x.shape[:2]
        else:
            params.batch, params.total = cu_seqlens.shape[0] - 1, x.shape[0]
        for name, index in indices.items():
            if index is not None:
                setattr(params, name, self.keep(index.contiguous()).data_ptr())
        if rope is not None and rope.cos.numel() > 0:
            self._set_position(rope)

    def _set_position(self, rope: Rope) -> None:
        params = self.params
        params.rope_cos = self.keep(floats(rope.cos)).data_ptr()
        params.rope_sin = self.keep(floats(rope.sin)).data_ptr()
        if rope.offsets is not None:
            params.rope_offsets = self.keep(to_int32(rope.offsets).int().contiguous()).data_ptr()
        params.rope_rows, params.rotary_dim = rope.cos.shape[0], 2 * rope.cos.shape[1]
        params.interleaved = int(rope.interleaved)

    def set_mean(self, mean: Tensor) -> None:
        """(batch, heads, d) or (heads, d); what it is, or, in fp32, where it is to be written."""
        self.params.mean = _row_ref(self.keep(floats(mean)))

    def keep(self, x: Tensor) -> Tensor:
        """x, alive until the launches are enqueued; the stream does the rest."""
        self._kept.append(x)
        return x

    def launch(self, variant: QuantizeVariant) -> None:
        device = self.x.device.index or 0
        stream = streams.current_stream(self.x)
        _native.launch_quantize(kernels.kernel(variant), device, stream, self.params)


class Call:
    """The launches of a request, which share their parameters, and what they fill."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._launcher = Launcher(
            request.x, request.rope, cu_seqlens=request.cu_seqlens, seqused=request.seqused
        )
        x = self._launcher.x
        self.data = allocate(request.data_shape(), request.dtype, x)
        self.descale = allocate(
            (0,) if request.descale is not None else request.descale_shape(), torch.float32, x
        )
        self.mean = allocate(request.mean_shape(), torch.float32, x)
        self._describe_data()
        self._describe_mean()
        self._describe_rotation()
        self._describe_scales()

    def launch(self) -> None:
        for variant in variants(self._request):
            # The pass before has left the last tiles in the cache.
            casts_last = variant.job == "cast" and len(jobs(self._request)) > 1
            self._launcher.params.reverse = int(casts_last)
            self._launcher.launch(variant)

    def _describe_data(self) -> None:
        params, data = self._launcher.params, self.data
        params.out = tensor_ref(data)
        if self._request.v_colmajor:
            batch_stride = 0 if self._request.packed else data.stride(0)
            params.out = (data.data_ptr(), batch_stride, data.stride(-2), data.stride(-3))

    def _describe_mean(self) -> None:
        request, launcher = self._request, self._launcher
        mean = request.mean
        if request.smooth:
            rotated, x = request.rotation is not None, launcher.x
            mean = allocate(request.mean_shape(), torch.float32, x) if rotated else self.mean
            partial = allocate(partial_mean_shape(request), torch.float32, x)
            launcher.params.mean_partial = launcher.keep(partial).data_ptr()
        if mean is None:
            return
        launcher.set_mean(mean)
        if request.rotation is not None:
            launcher.params.mean_rotated = _row_ref(self.mean)

    def _describe_rotation(self) -> None:
        rotation, params = self._request.rotation, self._launcher.params
        if rotation is not None:
            params.hadamard_block = rotation.block
            params.hadamard_scale = rotation.block**-0.5
            params.hadamard_signs = list(_sign_bits(rotation))

    def _describe_scales(self) -> None:
        request, launcher = self._request, self._launcher
        params = launcher.params
        params.scale_source = _scale_source(request)
        descale = self.descale
        if request.descale is not None:
            descale = launcher.keep(request.descale.contiguous())
            if request.amax is not None:
                params.amax = (request.amax.data_ptr(), 0, 0, 0)
        elif params.scale_source == _FROM_AMAX:
            amax = allocate(request.descale_shape(), torch.float32, launcher.x).zero_()
            params.amax = group_ref(launcher.keep(amax), request.packed)
        params.descale = group_ref(descale, request.packed)


def tensor_ref(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of (batch, tokens, heads, d) or (tokens, heads, d).

    torch gives a dimension of one any stride; here it is 0.
    """
    shape, steps = x.shape, x.stride()
    batch_step = steps[0] if len(shape) == 4 and shape[0] != 1 else 0
    row_step = 0 if shape[-3] == 1 else steps[-3]
    return x.data_ptr(), batch_step, row_step, 0 if shape[-2] == 1 else steps[-2]


def _row_ref(mean: Tensor) -> tuple[int, int, int]:
    """(batch, heads, d), or (heads, d) for all of the batch; contiguous."""
    return mean.data_ptr(), mean.stride(0) if mean.dim() == 3 else 0, mean.stride(-2)


def group_ref(values: Tensor, packed: bool) -> tuple[int, int, int, int]:
    """Contiguous values of a shape of `flash8.tensors.descales`."""
    if values.dim() == 0:
        return values.data_ptr(), 0, 0, 0
    heads, blocks = values.shape[1], values.shape[2] if values.dim() == 3 else 1
    by_block = 0 if blocks == 1 else 1
    batch_stride = 0 if packed and values.dim() == 3 else heads * blocks
    return values.data_ptr(), batch_stride, blocks, by_block


def floats(x: Tensor) -> Tensor:
    """x in fp32, contiguous, where 16-byte loads meet its rows."""
    y = x.float().contiguous()
    return y if y.data_ptr() % 16 == 0 else y.clone()


def aligned(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """x, or a copy where the kernels' 16-byte loads would not meet its rows, and its tensor_ref."""
    ref = tensor_ref(x)
    address, *steps = ref
    if x.stride(-1) == 1 and address % 16 == 0 and all(step % 8 == 0 for step in steps):
        return x, ref
    copy = x.clone(memory_format=torch.contiguous_format)
    return copy, tensor_ref(copy)


@functools.cache
def _variant(
    job: Job, dtype: Input, head_dim: int, out: Output, v_colmajor: bool
) -> QuantizeVariant:
    return QuantizeVariant(job, dtype, head_dim, out, v_colmajor)


@functools.cache
def _sign_bits(rotation: Rotation) -> tuple[int, ...]:
    """Bit c % 32 of word c // 32: whether channel c changes its sign."""
    words = [0] * 8
    for channel, sign in enumerate(rotation.signs(torch.device("cpu")).tolist()):
        words[channel // 32] |= int(sign < 0.0) << channel % 32
    return tuple(words)
