"""Sees to it that the pack's extension loads in this Python, and builds it if it does not.

`_native` is made for one minor version of Python and needs a C library no older than that of its
build. Where the pack's does not load, g++ builds it from the checkout against the pybind11 of the
pack, all sources at once: seconds on a machine with many cores. It needs this Python's headers.

usage: python bench/gpu_extension.py PACK
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_steps.pack import ROOT, native_includes, native_sources

_FLAGS = ("-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-pthread")
#: The extension by itself, without torch, which takes seconds to import.
_LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("flash8._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.__version__, module.ABI_VERSION)
"""


def main() -> int:
    pack = Path(sys.argv[1]).resolve()
    target = extension_path(pack)
    reason = trouble(target)
    if reason is None:
        print(f"{target.name} of the pack loads in Python {sys.version.split()[0]}")
        return 0
    print(f"building the extension: {reason}", flush=True)
    build(pack, target)
    reason = trouble(target)
    print(f"{target.name}: " + ("built, and loads" if reason is None else reason))
    return int(reason is not None)


def extension_path(pack: Path) -> Path:
    """Where this Python looks for it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return pack / "site" / "flash8" / f"_native{suffix}"


def trouble(extension: Path) -> str | None:
    """Why it does not load here, or None. It is tried in another process: it may crash."""
    if not extension.is_file():
        return f"the pack has no {extension.name}"
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(extension)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    found, wanted = done.stdout.split(), [package_version(), abi_version()]
    if found != wanted:
        return f"{extension.name} has version and ABI {' '.join(found)}, not {' '.join(wanted)}"
    return None


def package_version() -> str:
    """As the build reads it, from the text: importing it would take torch along."""
    text = (ROOT / "python" / "flash8" / "_version.py").read_text()
    line = next(line for line in text.splitlines() if line.startswith("__version__"))
    return line.split('"')[1]


def abi_version() -> str:
    """Of the structs that host and device share, as the header has it."""
    found = re.search(r"kAbiVersion = (\d+)", (ROOT / "hopper" / "params.h").read_text())
    assert found is not None
    return found[1]


def build(pack: Path, target: Path) -> None:
    """Raises subprocess.CalledProcessError; the compiler has said why."""
    compiler = os.environ.get("CXX") or "g++"
    includes = [
        *native_includes(),
        pack / "pybind11" / "include",
        Path(sysconfig.get_path("include")),
    ]
    flags = [
        *_FLAGS,
        f'-DFLASH8_VERSION="{package_version()}"',
        *(f"-I{path}" for path in includes),
    ]
    with tempfile.TemporaryDirectory() as folder:

        def compile_source(source: Path) -> str:
            made = Path(folder) / f"{source.parent.name}_{source.stem}.o"
            subprocess.run([compiler, *flags, "-c", str(source), "-o", str(made)], check=True)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_source, native_sources()))
        made = Path(folder) / target.name
        link = [compiler, "-shared", "-pthread", *objects, "-o", str(made), "-ldl"]
        subprocess.run(link, check=True)
        target.write_bytes(made.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
