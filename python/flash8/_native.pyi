import builtins
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, TypedDict

from typing_extensions import Buffer

__version__: str
ABI_VERSION: int

class StructLayout(TypedDict):
    size: int
    align: int
    fields: dict[str, tuple[int, int]]

class DriverNotFoundError(RuntimeError): ...

class DriverError(RuntimeError):
    entry: str
    code: int
    name: str

class DeviceInfo:
    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def max_shared_bytes(self) -> int: ...

class DriverProbe:
    @property
    def available(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def devices(self) -> list[DeviceInfo]: ...

def layout() -> dict[str, StructLayout]: ...
def probe_driver() -> DriverProbe: ...

class Driver:
    def __init__(self, path: str) -> None: ...
    @staticmethod
    def process() -> Driver: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int: ...
    def devices(self) -> list[DeviceInfo]: ...
    def synchronize(self, device: int = 0) -> None: ...

class DeviceMemory:
    def __init__(self, driver: Driver, bytes: int, device: int = 0) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def write(self, data: Buffer, offset: int = 0) -> None: ...
    def read(self, bytes: int | None = None, offset: int = 0) -> builtins.bytes: ...

class Stream:
    def __init__(self, driver: Driver, device: int = 0) -> None: ...
    @property
    def handle(self) -> int: ...
    def synchronize(self) -> None: ...

class ElementType(IntEnum):
    UINT8 = 0
    FLOAT16 = 6
    FLOAT32 = 7
    BFLOAT16 = 9

class Swizzle(IntEnum):
    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3

def encode_tensor_map(
    driver: Driver,
    *,
    element_type: ElementType,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: Swizzle = ...,
) -> bytes: ...

class KernelInfo:
    @property
    def abi_version(self) -> int: ...
    @property
    def params_bytes(self) -> int: ...
    @property
    def kind(self) -> int: ...
    @property
    def entry(self) -> str: ...
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def head_dim_v(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def v_colmajor(self) -> bool: ...
    @property
    def paged(self) -> bool: ...
    @property
    def qv(self) -> bool: ...
    @property
    def appends(self) -> bool: ...
    @property
    def out_e4m3(self) -> bool: ...
    @property
    def max_splits(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def cluster(self) -> tuple[int, int, int]: ...
    @property
    def shared_bytes(self) -> int: ...

class Kernel:
    @property
    def name(self) -> str: ...
    @property
    def info(self) -> KernelInfo | None: ...
    def registers(self, device: int = 0) -> int: ...
    def local_bytes(self, device: int = 0) -> int: ...
    def multiprocessors(self, device: int = 0) -> int: ...
    def is_captured(self, device: int, stream: int) -> bool: ...
    def launch(
        self,
        grid: tuple[int, int, int],
        parameters: Iterable[Buffer],
        *,
        block: tuple[int, int, int] | None = None,
        cluster: tuple[int, int, int] | None = None,
        shared_bytes: int | None = None,
        stream: int = 0,
        device: int = 0,
        overlap_previous: bool = False,
    ) -> None: ...

class Library:
    def __init__(self, driver: Driver, image: bytes) -> None: ...
    def info(self, device: int = 0) -> KernelInfo: ...
    def kernel(self, name: str | None = None, device: int = 0) -> Kernel: ...

class Registry:
    def __init__(self, driver: Driver, resolver: Callable[[str, str], builtins.bytes]) -> None: ...
    def get(self, key: str, device: int = 0) -> Kernel: ...

class SequenceParams:
    cu_seqlens_q: int
    cu_seqlens_k: int
    seqused_q: int
    seqused_k: int
    leftpad_k: int
    kv_batch_idx: int
    total_q: int
    total_k: int
    batch: int
    batch_k: int
    max_seqlen_q: int
    max_seqlen_k: int

class ScoreParams:
    sinks: int
    alibi_slopes: int
    alibi_batch_stride: int
    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int
    attention_chunk: int

class DropoutParams:
    seed: int
    threshold: int
    keep_scale: float

class SchedulerParams:
    tile_count: int
    heads_per_section: int
    longest_first: int

class PageParams:
    page_table: int
    page_table_stride: int
    page_size: int
    num_pages: int
    max_pages: int

class ForwardParams:
    q: tuple[int, int, int, int]
    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]
    o: tuple[int, int, int, int]
    lse: tuple[int, int, int]
    q_descale: tuple[int, int, int, int]
    k_descale: tuple[int, int, int, int]
    v_descale: tuple[int, int, int, int]
    k_mean: tuple[int, int, int]
    v_mean: tuple[int, int, int]
    v_channel_descale: tuple[int, int, int]
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    o_type: ElementType
    heads_per_q_descale: int
    out_scale: tuple[int, int, int]
    @property
    def pages(self) -> PageParams: ...
    @property
    def sequences(self) -> SequenceParams: ...
    @property
    def scores(self) -> ScoreParams: ...
    @property
    def dropout(self) -> DropoutParams: ...
    @property
    def scheduler(self) -> SchedulerParams: ...

class BackwardParams:
    q: tuple[int, int, int, int]
    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]
    o: tuple[int, int, int, int]
    dout: tuple[int, int, int, int]
    dq: tuple[int, int, int, int]
    dk: tuple[int, int, int, int]
    dv: tuple[int, int, int, int]
    lse: tuple[int, int, int]
    dlse: tuple[int, int, int]
    k_mean: tuple[int, int, int]
    v_mean: tuple[int, int, int]
    q_descale: tuple[int, int, int, int]
    k_descale: tuple[int, int, int, int]
    v_descale: tuple[int, int, int, int]
    row_stats: int
    dq_accum: int
    dq_semaphore: int
    dsinks_partial: int
    dsinks: int
    dkv_partial: int
    head_splits: int
    q16: int
    key_mean: int
    heads_per_q_descale: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    @property
    def sequences(self) -> SequenceParams: ...
    @property
    def scores(self) -> ScoreParams: ...
    @property
    def dropout(self) -> DropoutParams: ...
    @property
    def scheduler(self) -> SchedulerParams: ...

WORKSPACE_UNIT: int

def backward_workspace(kernel: Kernel, call: BackwardParams) -> dict[str, int]: ...

class DecodeParams:
    q: tuple[int, int, int, int]
    qv: tuple[int, int, int, int]
    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]
    o: tuple[int, int, int, int]
    lse: tuple[int, int, int]
    q_descale: tuple[int, int, int, int]
    k_descale: tuple[int, int, int, int]
    v_descale: tuple[int, int, int, int]
    k_mean: tuple[int, int, int]
    v_mean: tuple[int, int, int]
    q_is_e4m3: int
    heads_per_q_descale: int
    k_scale_rows: int
    v_scale_rows: int
    partials: int
    tickets: int
    tree_mask: int
    tree_mask_stride: int
    scheduler_metadata: int
    split_keys: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    @property
    def pages(self) -> PageParams: ...
    @property
    def sequences(self) -> SequenceParams: ...
    @property
    def scores(self) -> ScoreParams: ...
    @property
    def append(self) -> AppendParams: ...

def decode_workspace(
    kernel: Kernel, device: int, call: DecodeParams, sm_margin: int = 0
) -> dict[str, int]: ...

class ScheduleParams:
    @property
    def call(self) -> DecodeParams: ...
    scheduler_metadata: int
    cu_seqlens_k_new: int
    seqlen_k_new: int
    block_m: int
    tile_head_dim: int
    tile_head_dim_v: int
    qv: int
    element_bytes: int

def launch_schedule(kernel: Kernel, device: int, stream: int, call: ScheduleParams) -> None: ...

class AppendedRows:
    x: tuple[int, int, int, int]
    out: tuple[int, int, int, int]
    mean: tuple[int, int, int]
    descale: tuple[int, int, int, int]
    cu_seqlens: int
    tokens: int
    seqlen: int
    heads: int
    head_dim: int
    descale_by_slot: int
    rotates: int
    advances: int
    norm_weight: int
    norm_is_fp32: int
    norm_eps: float

class RotaryParams:
    cos: int
    sin: int
    offsets: int
    cos_stride: int
    sin_stride: int
    positions: int
    rotary_dim: int
    interleaved: int
    is_fp32: int

class PlaceParams:
    cache_seqlens: int
    page_table: int
    kv_batch_idx: int
    page_table_stride: int
    table_rows: int
    max_pages: int
    num_slots: int
    slot_tokens: int

class AppendParams:
    @property
    def q(self) -> AppendedRows: ...
    @property
    def k(self) -> AppendedRows: ...
    @property
    def v(self) -> AppendedRows: ...
    @property
    def rotary(self) -> RotaryParams: ...
    @property
    def place(self) -> PlaceParams: ...
    lengths: int
    batch: int

class QuantizeParams:
    x: tuple[int, int, int, int]
    out: tuple[int, int, int, int]
    mean: tuple[int, int, int]
    mean_rotated: tuple[int, int, int]
    mean_partial: int
    descale: tuple[int, int, int, int]
    amax: tuple[int, int, int, int]
    rope_cos: int
    rope_sin: int
    rope_offsets: int
    cu_seqlens: int
    seqused: int
    total: int
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    rope_rows: int
    rotary_dim: int
    interleaved: int
    scale_source: int
    hadamard_block: int
    hadamard_scale: float
    hadamard_signs: list[int]
    reverse: int
    def copy(self) -> QuantizeParams: ...

class QuantizeMatrixParams:
    x: int
    other: int
    sum: int
    norm_weight: int
    out: int
    scale: int
    x_stride: int
    other_stride: int
    sum_stride: int
    out_stride: int
    scale_stride: int
    rows: int
    columns: int
    by_row: int
    row_threads: int
    norm_is_fp32: int
    norm_eps: float

class GemmParams:
    a: int
    b: int
    out: int
    bias: int
    scale_a: tuple[int, int, int]
    scale_b: tuple[int, int, int]
    scale_result: int
    a_stride: int
    b_stride: int
    out_stride: int
    m: int
    n: int
    k: int
    out_type: ElementType
    bias_type: ElementType
    scale_a_row_shift: int
    group_rows: int
    b_group_stride: int
    scale_a_group_stride: int
    scale_b_group_stride: int
    groups: int
    rows_per_group: int
    splits: int

def launch_gemm(kernel: Kernel, device: int, stream: int, call: GemmParams) -> None: ...

class QkvParams:
    @property
    def gemm(self) -> GemmParams: ...
    q: tuple[int, int, int, int]
    k: tuple[int, int, int, int]
    v: tuple[int, int, int, int]
    q_descale: tuple[int, int, int, int]
    k_descale: tuple[int, int, int, int]
    v_descale: tuple[int, int, int, int]
    q_norm: int
    k_norm: int
    rope_cos: int
    rope_sin: int
    rope_offsets: int
    cu_seqlens: int
    seqused: int
    batch: int
    seqlen: int
    heads_q: int
    heads_kv: int
    rope_rows: int
    rotary_dim: int
    interleaved: int
    norm_eps: float

def launch_qkv(kernel: Kernel, device: int, stream: int, call: QkvParams) -> None: ...
def launch_quantize_matrix(
    kernel: Kernel, device: int, stream: int, call: QuantizeMatrixParams
) -> None: ...
def launch_quantize(kernel: Kernel, device: int, stream: int, call: QuantizeParams) -> None: ...
def launch_append(kernel: Kernel, device: int, stream: int, call: AppendParams) -> None: ...
def launch_forward(
    kernel: Kernel, device: int, stream: int, call: ForwardParams, sm_margin: int = 0
) -> None: ...
def launch_backward(
    preprocess: Kernel,
    kernel: Kernel,
    postprocess: Kernel,
    device: int,
    stream: int,
    call: BackwardParams,
) -> None: ...
def launch_decode(
    kernel: Kernel, device: int, stream: int, call: DecodeParams, sm_margin: int = 0
) -> None: ...

class PlanCache:
    def __init__(
        self,
        *,
        exchange_api: object | None,
        tensor: type,
        parameter: type,
        empty_like: Callable[..., object],
        current_stream: Callable[..., int],
        increment_version: Callable[..., None],
        tile_count: Callable[..., object],
    ) -> None: ...
    def run(
        self, scope: object, arguments: dict[str, Any], want_lse: bool, grad_enabled: bool, /
    ) -> tuple[Any, Any, Any] | None: ...
    def has_key(self, scope: object, arguments: dict[str, Any], /) -> bool: ...
    def insert(
        self,
        scope: object,
        arguments: dict[str, Any],
        *,
        kernel: Kernel,
        device: int,
        sm_margin: int,
        dynamic_schedule: bool,
        params: ForwardParams,
        out_like: object,
        lse_like: object,
        options: object,
        most_plans: int,
    ) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class AppendPlan:
    def __init__(
        self,
        launches: Sequence[tuple[Kernel | None, AppendParams]],
        lengths_like: object | None,
        rotated_like: object | None,
    ) -> None: ...

class GemmCache:
    def __init__(
        self,
        *,
        exchange_api: object | None,
        tensor: type,
        parameter: type,
        empty_like: Callable[..., object],
        current_stream: Callable[..., int],
        increment_version: Callable[..., None],
    ) -> None: ...
    def run(self, scope: object, arguments: dict[str, Any], /) -> Any: ...
    def has_key(self, scope: object, arguments: dict[str, Any], /) -> bool: ...
    def insert(
        self,
        scope: object,
        arguments: dict[str, Any],
        *,
        kernel: Kernel,
        device: int,
        params: GemmParams,
        out_like: object,
        most_plans: int,
    ) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class DecodeCache:
    def __init__(
        self,
        *,
        exchange_api: object | None,
        tensor: type,
        parameter: type,
        empty_like: Callable[..., object],
        current_stream: Callable[..., int],
        increment_version: Callable[..., None],
        kernels: object,
        is_grad_enabled: Callable[[], bool],
        workspace: Callable[..., object],
    ) -> None: ...
    def run(self, **arguments: Any) -> tuple[Any, Any] | dict[str, Any]: ...
    def has_key(self, arguments: dict[str, Any], /) -> bool: ...
    def insert(
        self,
        arguments: dict[str, Any],
        *,
        kernel: Kernel,
        device: int,
        sm_margin: int,
        params: DecodeParams,
        out_like: object,
        lse_like: object,
        partial_bytes: int,
        returns_lse: bool,
        append: AppendPlan | None,
        most_plans: int,
    ) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

class BackwardCache:
    def __init__(
        self,
        *,
        exchange_api: object | None,
        tensor: type,
        parameter: type,
        empty_like: Callable[..., object],
        current_stream: Callable[..., int],
        increment_version: Callable[..., None],
        field_names: tuple[str, ...],
    ) -> None: ...
    def run(
        self,
        scope: object,
        saved: tuple[Any, ...],
        incoming: tuple[Any, Any],
        options: tuple[Any, ...],
        names: tuple[str, ...],
        deterministic: bool,
        /,
    ) -> tuple[Any, Any, Any, Any] | None: ...
    def insert(
        self,
        scope: object,
        saved: tuple[Any, ...],
        incoming: tuple[Any, Any],
        options: tuple[Any, ...],
        names: tuple[str, ...],
        deterministic: bool,
        *,
        kernels: tuple[Kernel, Kernel, Kernel],
        device: int,
        params: BackwardParams,
        gradients_like: tuple[object, object, object],
        dsinks_like: object | None,
        workspace_like: object,
        most_plans: int,
    ) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...
