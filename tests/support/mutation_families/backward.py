"""The backward kernel between its preprocess and postprocess."""

import functools
from dataclasses import dataclass, replace

import torch

import backward_cases
from backward_launch import BackwardKernels, Gradients
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import device, int32, packed
from tolerances import rel_l2

from .runs import Run, by_seed, image_of, loaded_bytes, loading, text_of


@functools.cache
def problems(variant: BackwardVariant) -> tuple[tuple[backward_cases.Problem, range], ...]:
    """Calls and seeds: a tile with ragged sides; two heads over one block of keys; so many that a
    barrier that expects one warp too few is a round ahead in the end, and K without a mean; short
    and empty sequences, used lengths; blocks of keys that add to the same queries; unmasked tiles.
    """
    offsets = packed((70, 0, 5))
    total = int(offsets[-1])
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "seqused_k": int32([61, 0, 0])}
    longest = {"max_seqlen_q": 70, "max_seqlen_k": 70}
    many = backward_cases.draw(variant, 20, 20, 16, 1, batch=1)
    return (
        (backward_cases.draw(variant, 20, 20, 1, 1, batch=1), range(1)),
        (backward_cases.draw(variant, 130, 100, 2, 1, batch=1), range(4)),
        (replace(many, k_mean=torch.linspace(-1, 1, variant.head_dim)[None, None]), range(1)),
        (backward_cases.draw(variant, total, total, 1, 1, indices=indices, **longest), range(2)),
        (backward_cases.draw(variant, 100, 200, 1, 1, batch=1), range(4)),
        (backward_cases.draw(variant, 250, 250, 1, 1, batch=1), range(3)),
    )


def load(variant: BackwardVariant, ptx: str) -> BackwardKernels:
    with loading(device()):
        return backward_cases.kernels(variant).with_kernel(image_of(ptx))


def launch(
    kernels: BackwardKernels, variant: BackwardVariant, problem: backward_cases.Problem, seed: int
) -> tuple[Gradients, int]:
    """Gradients, and how many bytes have been loaded."""
    device().configure(watch="flash8_backward")
    try:
        given = backward_cases.saved(problem)
        found = backward_cases.launch(variant, given, seed=seed, built=kernels)
        loaded = loaded_bytes(device())
    finally:
        device().configure(watch="")
    return found, loaded


@dataclass(frozen=True)
class Backward:
    """The kernel between preprocess and postprocess, which stay what they are."""

    name: str
    variant: BackwardVariant

    def ptx(self) -> str:
        return text_of(backward_cases.images(self.variant)[1])

    def cases(self) -> Run:
        kernels = backward_cases.kernels(self.variant)
        given = problems(self.variant)
        wanted = [launch(kernels, self.variant, problem, 0) for problem, _ in given]
        for (problem, _), (right, _) in zip(given, wanted, strict=True):
            backward_cases.compare(problem, right)
        turns = by_seed(*zip(*given, strict=True), wanted)

        def run(ptx: str) -> None:
            mutant = load(self.variant, ptx)
            for seed, problem, (right, bytes_) in turns:
                found, loaded = launch(mutant, self.variant, problem, seed)
                for name in ("dk", "dv"):
                    same = torch.equal(getattr(found, name), getattr(right, name))
                    assert same, f"seed {seed}: {name} differs"
                # Blocks of keys add to dQ in any order.
                error = rel_l2(found.dq, right.dq.double())
                assert error <= 1e-3, f"seed {seed}: dQ differs by {error:.1e}"
                assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded, not {bytes_}"

        return run
