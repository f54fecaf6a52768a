"""The "cubins" of the fake driver: ELF files with a KernelInfo, packed by the layout the extension
reports."""

import struct

from flash8 import _native

LAYOUT = _native.layout()


def tma_boxes(*boxes: tuple[int, tuple[int, ...], int, int]) -> tuple[int, ...]:
    """The tma field: (rank, box, element type, swizzle) for each map, and empty ones behind."""
    words = [
        (rank, *box, *(5 - len(box)) * (1,), kind, swizzle) for rank, box, kind, swizzle in boxes
    ]
    return tuple(word for map in words for word in map) + (0,) * 8 * (8 - len(words))


def elf(
    constants: bytes, symbols: dict[str, tuple[int, int]], section: str = ".nv.constant3"
) -> bytes:
    """A cubin with this one section, behind its header, and objects {name: (offset, size)} in it.

    The order is that of ptxas: header, data, names, symbols, and the table of sections last.
    """
    names = b"\0" + b"".join(name.encode() + b"\0" for name in symbols)
    titles = b"\0.shstrtab\0.strtab\0.symtab\0" + section.encode() + b"\0"
    table, at = bytes(24), 1
    for name, (offset, size) in symbols.items():
        table += struct.pack("<IBBHQQ", at, _OBJECT, 0, 1, offset, size)
        at += len(name) + 1
    # (offset of the title, type, link, size of an entry, contents)
    parts = [
        (titles.index(section.encode()), 1, 0, 0, constants),
        (titles.index(b".symtab"), 2, 3, 24, table),
        (titles.index(b".strtab"), 3, 0, 0, names),
        (titles.index(b".shstrtab"), 3, 0, 0, titles),
    ]
    body, headers = b"", bytes(64)
    for title, kind, link, entry, contents in parts:
        start = _HEADER + len(body)
        headers += struct.pack(
            "<IIQQQQIIQQ", title, kind, 0, 0, start, len(contents), link, 0, 8, entry
        )
        body += contents + bytes(-len(contents) % 8)
    identity = b"\x7fELF\x02\x01\x01\x41\x08" + bytes(7)
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, _HEADER + len(body), 0, _HEADER, 56, 0, 64, 5, 4
    )
    return header + body + headers


_HEADER = 64
_OBJECT = 1


def fake_cubin(**values: int | str | tuple[int, ...]) -> bytes:
    """A cubin whose KernelInfo has these fields, and sensible others unless given."""
    info = kernel_info(**values)
    return elf(info, {"kernel_info": (0, len(info))})


def kernel_info(**values: int | str | tuple[int, ...]) -> bytes:
    """A KernelInfo with these fields, sensible others, and the right ABI version unless given."""
    fields: dict[str, int | str | tuple[int, ...]] = {
        "abi_version": _native.ABI_VERSION,
        "info_bytes": LAYOUT["KernelInfo"]["size"],
        "params_bytes": LAYOUT["ForwardParams"]["size"],
        "kind": 1,
        "entry": "forward",
        "threads": 384,
        "cluster": (1, 1, 1),
        "shared_bytes": 200_000,
        "kBlockM": 128,
        "kBlockN": 128,
        "kHeadDim": 128,
        "kHeadDimV": 128,
        "kStages": 2,
    }
    image = bytearray(LAYOUT["KernelInfo"]["size"])
    for name, value in (fields | values).items():
        offset, size = LAYOUT["KernelInfo"]["fields"][name]
        if isinstance(value, str):
            image[offset : offset + size] = value.encode().ljust(size, b"\0")
        else:
            parts = value if isinstance(value, tuple) else (value,)
            struct.pack_into(f"<{len(parts)}i", image, offset, *parts)
    return bytes(image)


_TILES = {
    "bf16": (64, _native.ElementType.BFLOAT16),
    "fp16": (64, _native.ElementType.FLOAT16),
    "e4m3": (128, _native.ElementType.UINT8),
}


def forward_cubin(variant: str, kind: str = "cubin") -> bytes:
    """A kernel for the calls of the forward variant of this name; a Registry asks for it so."""
    dtype = next(dtype for dtype in _TILES if dtype in variant)
    width, element_type = _TILES[dtype]
    box = (4, (width, 128, 1, 1), element_type, _native.Swizzle.B128)
    widens = "16_e4m3_" in variant
    return fake_cubin(
        tma=tma_boxes(box) if widens else tma_boxes(box, box, box),
        scale_block=128 if dtype == "e4m3" else 0,
        paged=4 if widens else 3 if "gather" in variant else 2 if "_paged" in variant else 0,
    )


#: Of the kernels of the backward.
_KINDS = {"preprocess": 2, "kernel": 3, "postprocess": 4}


def backward_cubin(
    variant: str = "backward_bf16_d128", **values: int | str | tuple[int, ...]
) -> bytes:
    """A kernel for the calls of the backward variant, or step, of this name."""
    step = next((step for step in _KINDS if f"_{step}_" in variant), "kernel")
    width, element_type = _TILES[next(dtype for dtype in _TILES if dtype in variant)]
    head_dim = next(d for d in (64, 96, 128, 192, 256) if f"_d{d}" in variant)
    block_m, block_n = 128 if head_dim == 64 else 64, 128 if head_dim <= 128 else 64
    rows = (block_m, block_n, block_n, block_m) if step == "kernel" else ()
    boxes = [(4, (width, n, 1, 1), element_type, _native.Swizzle.B128) for n in rows]
    fp8 = variant.endswith("_fp8")
    if fp8 and boxes:  # of q, k and v
        stored, swizzle = _native.ElementType.UINT8, _native.Swizzle.B128
        boxes[:3] = [(4, (min(head_dim, 128), n, 1, 1), stored, swizzle) for n in rows[:3]]
    given: dict[str, int | str | tuple[int, ...]] = {
        "kind": _KINDS[step],
        "entry": "backward" if step == "kernel" else step,
        "params_bytes": LAYOUT["BackwardParams"]["size"],
        "kBlockM": block_m,
        "kBlockN": block_n,
        "kHeadDim": head_dim,
        "kHeadDimV": head_dim,
        "scale_block": 128 if fp8 else 0,
        "tma": tma_boxes(*boxes),
        "threads": 384 if step == "kernel" else 256,
        "shared_bytes": 200_000 if step == "kernel" else 0,
    }
    return fake_cubin(**{**given, **values})


def decode_cubin(
    variant: str = "decode_bf16_d128_rows8", **values: int | str | tuple[int, ...]
) -> bytes:
    """A kernel for the calls of the decode variant of this name."""
    width, element_type = _TILES[next(x for x in ("e4m3", "fp16", "bf16") if x in variant)]
    box = (4, (width, 64, 1, 1), element_type, _native.Swizzle.B128)
    rows = next(n for n in (8, 16, 32) if f"_rows{n}" in variant)
    gathered = (0, *box[1:])
    given: dict[str, int | str | tuple[int, ...]] = {
        "kind": 5,
        "entry": "decode",
        "params_bytes": LAYOUT["DecodeParams"]["size"],
        "kBlockM": rows,
        "kBlockN": 64,
        "kHeadDim": 256 if "d256" in variant else 128,
        "kHeadDimV": 512 if "512" in variant else 256 if "d256" in variant else 128,
        "qv": int("_qv" in variant),
        "appends": int("_append" in variant),
        "scale_block": int("keyscales" in variant),
        "tma": tma_boxes(*(2 * (gathered if "gather" in variant else box,))),
        "threads": 256,
    }
    return fake_cubin(**{**given, **values})


_JOBS = {"cast": 6, "amax": 7, "mean": 8, "mean_finish": 9}
_APPEND, _SCHEDULE, _GEMM, _GEMM_GROUPED_K, _QKV = 10, 11, 12, 16, 18
_PROLOGUES = {"rms_norm": 14, "silu_mul": 15}


def quantize_cubin(variant: str) -> bytes:
    """A kernel for the calls of the quantizer variant of this name."""
    job = max((job for job in _JOBS if variant.startswith(f"quantize_{job}")), key=len)
    size = LAYOUT["QuantizeParams"]["size"]
    return fake_cubin(
        kind=_JOBS[job], entry=job, params_bytes=size, threads=256, shared_bytes=0, kBlockM=128
    )


def quantize_matrix_cubin(variant: str = "quantize_matrix_bf16") -> bytes:
    """A kernel for the calls of the variant of this name that makes operands of products."""
    kind = next((kind for name, kind in _PROLOGUES.items() if variant.endswith(name)), 13)
    size = LAYOUT["QuantizeMatrixParams"]["size"]
    return fake_cubin(
        kind=kind, entry="quantize_matrix", params_bytes=size, threads=256, shared_bytes=0
    )


def append_cubin() -> bytes:
    """A kernel for the calls of any appending variant."""
    size = LAYOUT["AppendParams"]["size"]
    return fake_cubin(
        kind=_APPEND, entry="append", params_bytes=size, threads=256, shared_bytes=0, kBlockM=1
    )


def schedule_cubin() -> bytes:
    """A kernel that makes scheduler metadata."""
    size = LAYOUT["ScheduleParams"]["size"]
    return fake_cubin(
        kind=_SCHEDULE, entry="schedule", params_bytes=size, threads=512, shared_bytes=0, kBlockM=1
    )


def gemm_cubin(variant: str = "gemm_block_128x128", **values: int | str | tuple[int, ...]) -> bytes:
    """A kernel for the calls of the GEMM variant of this name."""
    block_m, block_n = (int(size) for size in variant.rpartition("_")[2].split("x"))
    along_k = "_grouped_k_" in variant
    extra = (1,) if "_grouped_" in variant and not along_k else ()  # of B, the groups
    ctas = 2 if "_cluster_" in variant else 1  # each loads a share of B
    boxes = [
        (len(box), box, _native.ElementType.UINT8, _native.Swizzle.B128)
        for box in ((128, block_m, 1, 1), (128, block_n // ctas, 1, 1, *extra))
    ]
    for name, kind in (("_bf16_", "BFLOAT16"), ("_fp16_", "FLOAT16")):
        if name in variant:
            wide = getattr(_native.ElementType, kind)
            boxes[0] = (4, (128, block_m, 1, 1), wide, _native.Swizzle.NONE)
    given: dict[str, int | str | tuple[int, ...]] = {
        "kind": _GEMM_GROUPED_K if along_k else _GEMM,
        "entry": "gemm",
        "params_bytes": LAYOUT["GemmParams"]["size"],
        "kBlockM": block_m,
        "kBlockN": block_n,
        "scale_block": 128 if "_block_" in variant else 0,
        "cluster": (ctas, 1, 1),
        "max_splits": 8 if "_small_m_" in variant and block_n == 64 else 1,
        "tma": tma_boxes(*boxes),
    }
    return fake_cubin(**{**given, **values})


def qkv_cubin(variant: str = "qkv_projection_block") -> bytes:
    """A kernel for the calls of the QKV projection of this name."""
    box = (4, (128, 128, 1, 1), _native.ElementType.UINT8, _native.Swizzle.B128)
    return fake_cubin(
        kind=_QKV,
        entry="qkv_projection",
        params_bytes=LAYOUT["QkvParams"]["size"],
        scale_block=128 if variant.endswith("_block") else 0,
        v_colmajor=1,
        tma=tma_boxes(box, box),
    )


def any_cubin(variant: str, kind: str = "cubin") -> bytes:
    """A kernel for the calls of any variant; a Registry asks for it so."""
    if variant.startswith("quantize_matrix_"):
        return quantize_matrix_cubin(variant)
    if variant.startswith("quantize_"):
        return quantize_cubin(variant)
    if variant.startswith("append_"):
        return append_cubin()
    if variant == "decode_schedule":
        return schedule_cubin()
    if variant.startswith("qkv_"):
        return qkv_cubin(variant)
    if variant.startswith("gemm_"):
        return gemm_cubin(variant)
    if variant.startswith("decode_"):
        return decode_cubin(variant)
    if variant.startswith("backward_"):
        return backward_cubin(variant)
    return forward_cubin(variant, kind)
