"""Builds build/gpu-pack: flash8 with every kernel that `make gpu-check` runs, compiled here.

A pack travels with the checkout to a machine with a GPU and perhaps no network, where nothing is
compiled but, for another Python, the extension. It is made for the commit that it is built from:
gpu_check.py refuses it beside other sources.

Run it by the Python of `make install`: its flash8 compiles the kernels, into its cache.

usage: python bench/gpu_pack.py [--jobs N] [--python PYTHON] [DIR]
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

import environment
import facts
from flash8.backends.hopper.kernels import shipped
from flash8.compiler import Compiled, Unit, compile_unit, write_package
from gpu_steps import units
from gpu_steps.journal import write_json
from gpu_steps.pack import PACK, ROOT, source_digest

MOST_BYTES = 60 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=PACK)
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="also build the extension for this interpreter, whose headers must be there",
    )
    options = parser.parse_args()
    fresh = options.folder.with_name(options.folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        build(fresh, options.jobs, options.python)
        shutil.rmtree(options.folder, ignore_errors=True)
        fresh.rename(options.folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"{options.folder}: {size(options.folder) / 2**20:.1f} MB")
    return 0


def build(folder: Path, jobs: int, pythons: list[str]) -> None:
    """Raises subprocess.CalledProcessError or CompileError, or ValueError if it is too large."""
    digest = source_digest()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += [
        "--no-deps",
        "--no-build-isolation",
        "--no-compile",
        "--target",
        str(folder / "site"),
    ]
    subprocess.run([*install, str(ROOT)], check=True)
    compiled = compile_all(units.units(), jobs)
    write_package(compiled, folder / "site" / "flash8" / "kernels")
    facts.compile_images(folder / "facts")
    (folder / "tests").mkdir()
    compiled_tests = compile_unit(Unit(ROOT / "tests" / "gpu" / "gpu_driver.cu"))
    (folder / "tests" / "gpu_driver.cubin").write_bytes(compiled_tests.cubin.read_bytes())
    (folder / "tests" / "gpu_driver.ptx").write_bytes(compiled_tests.ptx.read_bytes())
    shutil.copytree(pybind11.get_include(), folder / "pybind11" / "include")
    for python in pythons:  # an interpreter without packages will do
        script = ROOT / "bench" / "gpu_extension.py"
        subprocess.run([python, str(script), str(folder)], check=True)
    if source_digest() != digest:
        raise ValueError("the sources have changed while the pack was built: build it again")
    manifest = {
        **environment.commit(),
        "sources": digest,
        "extensions": sorted(
            path.name for path in (folder / "site" / "flash8").glob("_native*.so")
        ),
        "kernels": [variant.name for variant in shipped()],
        "packaged_kernels": len(compiled),
    }
    write_json(folder / "pack.json", manifest)
    serve_without_a_compiler(folder)
    if size(folder) > MOST_BYTES:
        raise ValueError(f"the pack has {size(folder)} bytes; at most {MOST_BYTES} travel")


def compile_all(wanted: list[Unit], jobs: int) -> list[Compiled]:
    with ThreadPoolExecutor(jobs) as pool:
        steps = [
            pool.submit(_compile, unit, f"{i}/{len(wanted)}") for i, unit in enumerate(wanted, 1)
        ]
        return [step.result() for step in steps]


def _compile(unit: Unit, step: str) -> Compiled:
    compiled = compile_unit(unit)
    print(f"[{step}] {unit.name}: {compiled.seconds:.1f} s", flush=True)
    return compiled


_SERVE = """
import sys
from gpu_steps import units
from flash8.compiler import kernel_image
for unit in units.units():
    kernel_image(unit, "cubin")
"""


def serve_without_a_compiler(folder: Path) -> None:
    """Raises subprocess.CalledProcessError if the pack lacks a kernel, or does not trust one."""
    environ = {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT / 'bench'}"}
    environ |= {"FLASH8_COMPILE": "never", "FLASH8_NVCC": "/nowhere/nvcc"}
    environ["FLASH8_CACHE"] = str(folder / "no-cache")
    subprocess.run([sys.executable, "-P", "-c", _SERVE], env=environ, check=True)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
