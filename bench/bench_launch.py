"""Microseconds per kernel launch from Python, against a driver that does nothing.

What is left is flash8's own cost: argument conversion, checks, tensor maps, the context, the launch
structure. On a GPU the driver's own time comes on top.
"""

import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fake_driver import control
from fake_driver.cubin import LAYOUT, fake_cubin, tma_boxes
from flash8 import _native

REPEAT, NUMBER = 15, 5_000
BOX = (4, (64, 128, 1, 1), _native.ElementType.BFLOAT16, _native.Swizzle.B128)


def microseconds(call: Callable[[], object]) -> float:
    """The best of several runs: the others were disturbed."""
    return min(timeit.repeat(call, repeat=REPEAT, number=NUMBER)) / NUMBER * 1e6


def forward_call() -> _native.ForwardParams:
    """A dense causal call: batch 2, 4096 tokens, 16 heads of 128."""
    call = _native.ForwardParams()
    call.q = call.k = call.v = call.o = (4096, 4096 * 2048, 2048, 128)
    call.lse = (4096, 4096 * 16, 4096)
    call.heads_q = call.heads_kv = 16
    call.head_dim = call.head_dim_v = 128
    sequences, scores = call.sequences, call.scores
    sequences.batch = sequences.batch_k = 2
    sequences.max_seqlen_q = sequences.max_seqlen_k = 4096
    scores.softmax_scale, scores.window_left, scores.window_right = 0.1, -1, 0
    return call


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = control.build(Path(folder))
        fake = control.FakeDriver(path)
        fake.reset()
        fake.record(False)
        driver = _native.Driver(str(path))
        image = fake_cubin(cluster=(2, 1, 1), tma=tma_boxes(BOX, BOX, BOX))
        registry = _native.Registry(driver, lambda key, kind: image)
        kernel = registry.get("forward")
        grid, parameters = (132, 1, 1), [bytearray(LAYOUT["ForwardParams"]["size"])]
        call = forward_call()
        rows = {
            "registry lookup": lambda: registry.get("forward"),
            "any kernel: launch": lambda: kernel.launch(grid, parameters, stream=7),
            "forward: describe": forward_call,
            "forward: tensor maps and launch": lambda: _native.launch_forward(kernel, 0, 7, call),
        }
        for name, function in rows.items():
            print(f"{name:32} {microseconds(function):6.2f} us")


if __name__ == "__main__":
    main()
