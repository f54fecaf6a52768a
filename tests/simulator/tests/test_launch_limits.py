"""What the driver and the hardware refuse of a launch: each limit, just inside and just outside."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

import flash8_sim as S
from flash8_sim.simulator import ClusterDimension, LaunchAttribute, LaunchConfig

OPTIN = 227 * 1024
INVALID, RESOURCES, CLUSTER = (
    f"CUDA_ERROR_{name}"
    for name in ("INVALID_VALUE", "LAUNCH_OUT_OF_RESOURCES", "INVALID_CLUSTER_SIZE")
)
DYNAMIC, NON_PORTABLE = 8, 14


def function(
    sim: S.Simulator, directives: str = "", *, static: int = 0, others: int = 0, body: str = ""
) -> ctypes.c_void_p:
    """A kernel with `static` bytes of shared memory, beside `others` that it does not use."""
    module = f".shared .align 16 .b8 used[{static}]; " if static else ""
    module += f".shared .align 16 .b8 unused[{others}];" if others else ""
    uses = "mov.u32 x, used; st.shared.u32 [x], x;" if static else ""
    text = S.kernel(f".reg .b32 x; {uses} {body} ret;", directives=directives, module=module)
    found = ctypes.c_void_p()
    sim.call("cuModuleGetFunction", ctypes.byref(found), sim.load(text).handle, b"k")
    return found


def launch(
    sim: S.Simulator,
    kernel: ctypes.c_void_p,
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared: int = 0,
    cluster: tuple[int, int, int] | None = None,
) -> None:
    attribute = LaunchAttribute(id=4)
    attribute.value.cluster = ClusterDimension(*(cluster or (1, 1, 1)))
    dims = ctypes.c_uint * 3
    config = LaunchConfig(
        dims(*grid), dims(*block), shared, None, ctypes.pointer(attribute), 1 if cluster else 0
    )
    sim.call("cuLaunchKernelEx", ctypes.byref(config), kernel, None, None)


def refused(sim: S.Simulator, kernel: ctypes.c_void_p, name: str, words: str, **given: Any) -> None:
    with pytest.raises(S.SimulatorError) as caught:
        launch(sim, kernel, **given)
    assert caught.value.name == name and words in str(caught.value), str(caught.value)


def attribute_of(sim: S.Simulator, kernel: ctypes.c_void_p, which: int) -> int:
    value = ctypes.c_int()
    sim.call("cuFuncGetAttribute", ctypes.byref(value), which, kernel)
    return value.value


def set_attribute(sim: S.Simulator, kernel: ctypes.c_void_p, which: int, value: int) -> None:
    sim.call("cuFuncSetAttribute", kernel, ctypes.c_int(which), ctypes.c_int(value))


@pytest.mark.parametrize("static", [0, 16, 4096, 49152, 100000])
def test_dynamic_shared_memory(sim: S.Simulator, static: int) -> None:
    """Without the attribute 48 KB with the static part; with it 227 KB."""
    kernel = function(sim, static=static)
    assert attribute_of(sim, kernel, 1) == static
    default = max(0, 48 * 1024 - static)
    assert attribute_of(sim, kernel, DYNAMIC) == default
    launch(sim, kernel, shared=default)
    refused(sim, kernel, INVALID, "MAX_DYNAMIC_SHARED_SIZE_BYTES", shared=default + 1)
    set_attribute(sim, kernel, DYNAMIC, OPTIN - static)
    launch(sim, kernel, shared=OPTIN - static)
    refused(sim, kernel, INVALID, "MAX_DYNAMIC", shared=OPTIN - static + 1)
    for value in (OPTIN - static + 1, -1):
        with pytest.raises(S.SimulatorError, match=INVALID):
            set_attribute(sim, kernel, DYNAMIC, value)
    assert attribute_of(sim, kernel, DYNAMIC) == OPTIN - static
    set_attribute(sim, kernel, DYNAMIC, 1024)  # it may be lowered, and then holds
    launch(sim, kernel, shared=1024)
    refused(sim, kernel, INVALID, "which says 1024", shared=1025)


def test_static_shared_memory(sim: S.Simulator) -> None:
    launch(sim, function(sim, static=OPTIN))
    with pytest.raises(S.SimulatorError, match=r"CUDA_ERROR_INVALID_PTX.*exceed 227 KB"):
        function(sim, static=OPTIN + 16)


def test_a_kernel_pays_for_what_it_uses(sim: S.Simulator) -> None:
    """The compiler writes the shared variables of all kernels of a module at its top."""
    kernel = function(sim, static=64, others=OPTIN)
    assert attribute_of(sim, kernel, 1) == 64
    launch(sim, kernel, shared=48 * 1024 - 64)


@pytest.mark.parametrize("block", [(1024, 1, 1), (1, 1024, 1), (16, 1, 64), (4, 4, 64)])
def test_blocks_inside(sim: S.Simulator, block: tuple[int, int, int]) -> None:
    launch(sim, function(sim), block=block)


@pytest.mark.parametrize(
    "block", [(1025, 1, 1), (1, 1025, 1), (1, 1, 65), (32, 33, 1), (17, 1, 64), (1 << 31, 2, 1)]
)
def test_blocks_outside(sim: S.Simulator, block: tuple[int, int, int]) -> None:
    refused(sim, function(sim), INVALID, "a block of", block=block)


def test_grids(sim: S.Simulator) -> None:
    kernel = function(sim)
    sim.configure(threads=1, checks=False)
    launch(sim, kernel, grid=(1, 65535, 1))
    launch(sim, kernel, grid=(1, 1, 65535))
    for grid in ((1 << 31, 1, 1), (1, 65536, 1), (1, 1, 65536)):
        refused(sim, kernel, INVALID, "a grid of", grid=grid)
    for given in ({"grid": (0, 1, 1)}, {"block": (1, 0, 1)}, {"cluster": (1, 1, 0)}):
        refused(sim, kernel, INVALID, "is 0", **given)


def test_maxntid_counts_threads_and_reqntid_extents(sim: S.Simulator) -> None:
    most = function(sim, ".maxntid 8, 8, 1")
    for block in ((64, 1, 1), (1, 2, 32), (63, 1, 1)):
        launch(sim, most, block=block)
    refused(sim, most, RESOURCES, "65 threads a block, at most 64", block=(65, 1, 1))
    exact = function(sim, ".reqntid 8, 8, 1")
    launch(sim, exact, block=(8, 8, 1))
    for block in ((64, 1, 1), (8, 4, 1), (4, 8, 2)):
        refused(sim, exact, INVALID, ".reqntid says (8, 8, 1)", block=block)


@pytest.mark.parametrize("cluster", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_portable_clusters(sim: S.Simulator, cluster: tuple[int, int, int]) -> None:
    launch(sim, function(sim), grid=cluster, cluster=cluster)


@pytest.mark.parametrize("cluster", [(9, 1, 1), (16, 1, 1), (4, 4, 1), (3, 3, 1)])
def test_clusters_that_are_not_portable(sim: S.Simulator, cluster: tuple[int, int, int]) -> None:
    kernel = function(sim)
    refused(sim, kernel, CLUSTER, "8 are portable", grid=cluster, cluster=cluster)
    set_attribute(sim, kernel, NON_PORTABLE, 1)
    assert attribute_of(sim, kernel, NON_PORTABLE) == 1
    launch(sim, kernel, grid=cluster, cluster=cluster)
    set_attribute(sim, kernel, NON_PORTABLE, 0)
    refused(sim, kernel, CLUSTER, "8 are portable", grid=cluster, cluster=cluster)


def test_a_cluster_of_17_never_runs(sim: S.Simulator) -> None:
    kernel = function(sim)
    set_attribute(sim, kernel, NON_PORTABLE, 1)
    refused(sim, kernel, CLUSTER, "a cluster of 17", grid=(17, 1, 1), cluster=(17, 1, 1))


def test_the_grid_is_a_multiple_of_the_cluster(sim: S.Simulator) -> None:
    kernel = function(sim)
    launch(sim, kernel, grid=(4, 6, 2), cluster=(2, 3, 1))
    for grid in ((3, 6, 2), (4, 5, 2), (1, 3, 1)):
        refused(sim, kernel, CLUSTER, "no multiple of the cluster", grid=grid, cluster=(2, 3, 1))
    refused(sim, kernel, CLUSTER, "no multiple", grid=(2, 3, 3), cluster=(1, 1, 2))


def test_the_kernels_own_cluster(sim: S.Simulator) -> None:
    kernel = function(sim, ".explicitcluster .reqnctapercluster 2, 1, 1")
    assert attribute_of(sim, kernel, 10) == 1
    assert [attribute_of(sim, kernel, i) for i in (11, 12, 13)] == [2, 1, 1]
    launch(sim, kernel, grid=(4, 1, 1))
    launch(sim, kernel, grid=(4, 1, 1), cluster=(2, 1, 1))
    refused(sim, kernel, CLUSTER, "no multiple of the cluster", grid=(3, 1, 1))
    for cluster in ((1, 1, 1), (4, 1, 1), (1, 2, 1)):
        words = "not the kernel's .reqnctapercluster (2, 1, 1)"
        refused(sim, kernel, CLUSTER, words, grid=(4, 2, 1), cluster=cluster)


def test_other_cluster_directives(sim: S.Simulator) -> None:
    named = function(sim, ".explicitcluster")
    launch(sim, named, grid=(2, 1, 1), cluster=(2, 1, 1))
    refused(sim, named, CLUSTER, ".explicitcluster", grid=(2, 1, 1))
    most = function(sim, ".maxclusterrank 4")
    launch(sim, most, grid=(4, 1, 1), cluster=(4, 1, 1))
    refused(sim, most, CLUSTER, ".maxclusterrank", grid=(5, 1, 1), cluster=(5, 1, 1))
    wide = function(sim, ".explicitcluster .reqnctapercluster 16, 1, 1")
    refused(sim, wide, CLUSTER, "8 are portable", grid=(16, 1, 1))


def test_a_kernel_that_is_not_there(sim: S.Simulator) -> None:
    with pytest.raises(S.SimulatorError, match=r"CUDA_ERROR_NOT_FOUND.*no kernel 'absent'"):
        sim.load(S.kernel("ret;")).launch("absent")


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        *[(target, True) for target in ("sm_90a", "sm_90", "sm_80", "sm_75")],
        *[(target, False) for target in ("sm_100", "sm_100a", "sm_120f", "sm_91", "sm_80a")],
        *[(target, False) for target in ("compute_90a", "sm_", "sm_x")],
    ],
)
def test_targets(sim: S.Simulator, target: str, runs: bool) -> None:
    text = S.kernel("ret;").replace(".target sm_90a", f".target {target}")
    if runs:
        sim.load(text).unload()
    else:
        with pytest.raises(S.SimulatorError, match=r"CUDA_ERROR_INVALID_PTX.*target"):
            sim.load(text)
