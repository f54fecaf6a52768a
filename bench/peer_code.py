"""Compiles FlashAttention-3's forward kernels that bench/cycle_model.py is calibrated by.

usage: python bench/peer_code.py CHECKOUT FOLDER

CHECKOUT is one of github.com/Dao-AILab/flash-attention, at the commit in bench/sm_model/peers.py.
FOLDER gets a cubin each. They are compiled with flash8's own nvcc and CUTLASS and with the options
of the checkout's setup.py, which takes a minute and 4 GB of memory each. Nothing of the checkout
becomes part of flash8.
"""

import argparse
import subprocess
from pathlib import Path

from flash8.compiler import find_toolchain
from sm_model.peers import COMMIT, PEERS, Peer

_ELEMENTS = {"bf16": "cutlass::bfloat16_t", "e4m3": "cutlass::float_e4m3_t"}
_OPTIONS = (
    *("-cubin", "-arch=sm_90a", "-std=c++17", "-O3", "-w", "--use_fast_math", "-DNDEBUG"),
    *("--expt-relaxed-constexpr", "--expt-extended-lambda"),
    *("-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "-DCUTLASS_ENABLE_GDC_FOR_SM90"),
)


def source(peer: Peer) -> str:
    """One kernel: no cluster, no mask, and none of the options that come after it."""
    head_dims = f"{peer.head_dim}, {peer.head_dim}"
    element, flags = _ELEMENTS[peer.dtype], ", ".join(["false"] * 10)
    choice = f"90, {head_dims}, 1, {element}, cutlass::bfloat16_t, {flags}"
    return (
        '#include "flash_fwd_launch_template.h"\n'
        f"template void run_flash_fwd<{choice}>(Flash_fwd_params&, cudaStream_t);\n"
    )


def build(peer: Peer, checkout: Path, folder: Path) -> Path:
    toolchain = find_toolchain()
    file, cubin = folder / f"{peer.name}.cu", folder / f"{peer.name}.cubin"
    file.write_text(source(peer))
    places = [f"-I{path}" for path in (checkout / "hopper", *toolchain.include_dirs)]
    subprocess.run([toolchain.nvcc, *_OPTIONS, *places, file, "-o", cubin], check=True)
    return cubin


def main() -> None:
    parser = argparse.ArgumentParser(description=f"FlashAttention-3's kernels, commit {COMMIT}")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        print(build(peer, given.checkout, given.folder), flush=True)


if __name__ == "__main__":
    main()
