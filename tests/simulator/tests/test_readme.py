"""The example of README.md runs as it stands there, and finds what README.md says."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

import cute_kernels
import flash8_sim

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example(
    sim: flash8_sim.Simulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = README.read_text().partition("<!-- example -->\n```python\n")[2]
    example, _, rest = after.partition("```\n")
    monkeypatch.chdir(cute_kernels.KERNELS)
    monkeypatch.setattr(flash8_sim, "compile_ptx", kept)
    exec(compile(example, README, "exec"), {})
    said = ast.literal_eval(capsys.readouterr().out)
    assert f"It prints `{said}`" in rest


def kept(source: str, *, defines: Mapping[str, int]) -> str:
    """As `flash8_sim.compile_ptx`, once for all runs of the tests."""
    return cute_kernels.compile_ptx(Path(source).stem, **defines)


def test_its_fault_is_found(sim: flash8_sim.Simulator) -> None:
    ptx = cute_kernels.compile_ptx("gemm", GEMM_FP16=1)
    fence = "fence.mbarrier_init.release.cluster;"
    assert ptx.count(fence) == 1
    module = sim.load(ptx.replace(fence, ""))
    x, c = sim.zeros((128, 64), "f2"), sim.zeros((128, 128), "f4")
    tile = sim.tensor_map(
        x, dtype="f16", shape=[64, 128], strides=[128], box=[64, 128], swizzle="128"
    )
    with pytest.raises(flash8_sim.SimulatorError) as raised:
        module.launch("gemm", tile, tile, c, 128, 128, 64, grid=1, block=384, shared=200 * 1024)
    error = raised.value
    assert (error.kind, error.kernel) == ("proxy-fence", "gemm")
    assert (error.cta, error.warp) == ((0, 0, 0), 0)
    assert "cp.async.bulk.tensor" in ptx.splitlines()[error.line - 1]
    assert f"mbarrier {error.address:#x} was initialized" in str(error)
