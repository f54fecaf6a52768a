"""The leg of kernels on a driver that does nothing: what is launched is all that can be seen."""

import contextlib
import functools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flash8
from fake_driver import control
from fake_driver.cubin import any_cubin
from flash8 import _native, backends
from flash8.backends.cpu import append as portable
from flash8.backends.hopper import append as hopper
from flash8.backends.hopper import kernels, mode
from flash8.call.request import Appended, Queries
from fuzz import damage, targets
from fuzz.harness import attempt, shown
from plan_cache_cases import CALLS, clear, draw, without_addresses

_RECORDS = 512  # launches after which the driver forgets what it has recorded


class Driver:
    """The fake driver, and CPU tensors that take the Hopper backend on it."""

    def __init__(self, library: Path) -> None:
        self.fake = control.FakeDriver(library)
        self.fake.reset()
        self.registry = _native.Registry(_native.Driver(str(library)), any_cubin)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "kernels_wanted", lambda tensor: True)
            patch.setattr(mode, "kernels_mode", lambda: "on")
            patch.setattr(kernels, "registry", lambda: self.registry)
            patch.setattr(hopper, "launch", _launch)
            yield

    def launches(self, call: Callable[[], Any]) -> list[tuple[str, bytes]]:
        """What `call` launches: the driver's record, and the parameters without addresses."""
        before = len(self.fake.launches)
        call()
        new = range(before, len(self.fake.launches))
        return [(self.fake.launches[i], without_addresses(self.fake.parameter(i))) for i in new]


_real_launch = hopper.launch


def _launch(k: Appended, v: Appended, *, queries: Queries | None) -> hopper.Launched:
    """The kernel is launched and writes nothing here, but what follows reads the new lengths."""
    launched = _real_launch(k, v, queries=queries)
    launched.lengths.copy_(portable.lengths(k))
    return launched


class Leg:
    """Calls on one driver. Plans stay from one to the next, mostly."""

    def __init__(self, library: Path) -> None:
        self.driver = Driver(library)
        self._tensors = draw()
        with self.driver.serving():
            clear()
            self._right = {name: self._launches(name) for name in CALLS}
        assert all(self._right.values())

    def __call__(self, seed: int) -> str:
        rng = random.Random(f"driver {seed}")
        with self.driver.serving():
            if rng.random() < 0.05:
                clear()
            function, arguments = good(rng)
            times = rng.choice([0, 1, 1, 2, 3])
            spoilt = damage.spoil(rng, arguments, times)
            verdict, _ = attempt(function, spoilt)
            assert times or verdict == "returned", f"refused: {shown(arguments)}"
            if rng.random() < 0.2:  # once more: by now it may be a hit
                again, _ = attempt(function, spoilt)
                assert again == verdict, f"{verdict}, then {again}: {shown(spoilt)}"
            self._expect_right_launches(rng, f"{function.__name__}({shown(spoilt)})")
        if len(self.driver.fake.launches) > _RECORDS:
            self.driver.fake.reset()
        return f"{'hostile' if times else 'good'} {verdict}"

    def _launches(self, name: str) -> list[tuple[str, bytes]]:
        return self.driver.launches(lambda: CALLS[name](*self._tensors))

    def _expect_right_launches(self, rng: random.Random, before: str) -> None:
        name = rng.choice(sorted(self._right))
        found = self._launches(name)
        assert found == self._right[name], f"{name!r} launches something else after {before}"


def good(rng: random.Random) -> targets.Target:
    """A call that kernels serve, or any other."""
    if rng.random() < 0.3:
        return targets.draw(rng)
    width = rng.choice([64, 128, 72])
    q, k, v = draw(rng.randrange(5), rng.choice([1, 8, 16]), width=width)
    if rng.random() < 0.3:
        q, k, v = q.half(), k.half(), v.half()
    elif rng.random() < 0.3:
        q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    if rng.random() < 0.3 and q.dtype != torch.float8_e4m3fn:
        q.requires_grad_()
    options: dict[str, Any] = dict(
        q=q,
        k=k,
        v=v,
        softmax_scale=rng.choice([None, 0.2, 1]),
        causal=rng.random() < 0.5,
        window_size=rng.choice([(-1, -1), (5, 0), (3, 4)]),
        attention_chunk=0,
        softcap=rng.choice([0.0, 2.0]),
        num_splits=1,
        pack_gqa=rng.choice([None, True, False]),
        sm_margin=rng.choice([0, 3]),
        return_attn_probs=rng.random() < 0.5,
        s_aux=rng.choice([None, torch.ones(4)]),
        alibi_slopes=rng.choice([None, torch.ones(4), torch.ones(2, 4)]),
        dropout_p=rng.choice([0.0, 0.0, 0.1]),
        out=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    if rng.random() < 0.5:
        return flash8.flash_attn_func, options
    rows = q.shape[1]
    ends = torch.tensor([0, rows, 2 * rows], dtype=torch.int32)
    used = torch.tensor([rows, max(rows - 1, 0)], dtype=torch.int32)
    options |= {name: options[name].detach().flatten(0, 1) for name in "qkv"}
    options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends.clone()}
    options |= {"max_seqlen_q": rows, "max_seqlen_k": rows}
    options |= {"seqused_q": rng.choice([None, used]), "seqused_k": rng.choice([None, used])}
    return flash8.flash_attn_varlen_func, options


@functools.cache
def library() -> Path:
    """The fake driver, built once in a process; a folder of FLASH8_FUZZ_BUILD keeps it."""
    named = os.environ.get("FLASH8_FUZZ_BUILD")
    folder = Path(named) if named else Path(tempfile.mkdtemp(prefix="flash8-fuzz-"))
    built = folder / "libcuda_fake.so"
    return built if built.is_file() else control.build(folder)


@functools.cache
def leg() -> Leg:
    return Leg(library())


def prepare() -> None:
    leg()


def call(seed: int) -> str:
    return leg()(seed)
