"""Microseconds of CPU time per call, from the public function to the launch, against a driver that
does nothing.

What is left is flash8's own cost: argument conversion, checks, outputs, tensor maps, the context,
the launch structure. On a GPU the driver's own time comes on top, and torch.cuda.current_stream.
Beside it the same of torch's SDPA for one query and one key on a CPU, kernel included. Writes
bench/results/launch.json.
"""

import json
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import environment
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fake_driver import control
from fake_driver.cubin import fake_cubin, tma_boxes
from flash8 import _native, backends, flash_attn_func, flash_attn_varlen_func
from flash8.backends import hopper

RESULTS = Path(__file__).resolve().parent / "results"
REPEAT, NUMBER = 25, 1_000
BOX = (4, (64, 128, 1, 1), _native.ElementType.BFLOAT16, _native.Swizzle.B128)


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of the best of several runs: the others were disturbed."""
    call()
    times = timeit.repeat(call, repeat=REPEAT, number=NUMBER, timer=time.process_time)
    return min(times) / NUMBER * 1e6


@contextmanager
def kernels_on_a_fake_driver() -> Iterator[None]:
    """CPU tensors take the Hopper backend, as CUDA tensors do, and nothing runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = control.build(Path(folder))
        fake = control.FakeDriver(path)
        fake.reset()
        fake.record(False)
        image = fake_cubin(cluster=(1, 1, 1), tma=tma_boxes(BOX, BOX, BOX))
        registry = _native.Registry(_native.Driver(str(path)), lambda key, kind: image)
        wanted, real = backends.kernels_wanted, hopper._registry
        backends.kernels_wanted = lambda tensor: not backends._kernels_asked_for()
        hopper._registry = lambda: registry
        try:
            yield
        finally:
            backends.kernels_wanted, hopper._registry = wanted, real


def calls() -> dict[str, Callable[[], object]]:
    q = torch.randn(2, 64, 8, 128).bfloat16()
    k, v = (torch.randn(2, 64, 2, 128).bfloat16() for _ in range(2))
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    ends = torch.tensor([0, 64, 128], dtype=torch.int32)
    out = torch.empty_like(q)
    trained = [x.clone().requires_grad_() for x in (q, k, v)]
    one = torch.randn(1, 1, 1, 64).bfloat16()

    def training() -> object:
        with torch.enable_grad():
            return flash_attn_func(*trained, causal=True)

    return {
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            *packed, ends, ends, 64, 64, causal=True
        ),
        "flash_attn_func with out=": lambda: flash_attn_func(q, k, v, causal=True, out=out),
        "flash_attn_func with gradients": training,
        "torch SDPA, one query, one key": lambda: F.scaled_dot_product_attention(one, one, one),
    }


def main() -> None:
    torch.set_num_threads(1)
    with kernels_on_a_fake_driver(), torch.no_grad():
        rows = {name: round(microseconds(call), 2) for name, call in calls().items()}
    for name, value in rows.items():
        print(f"{name:32} {value:6.2f} us")
    results = {"environment": environment.describe(), "microseconds": rows}
    (RESULTS / "launch.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
