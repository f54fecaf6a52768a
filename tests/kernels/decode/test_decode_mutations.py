"""Faults planted in the decode kernel: waits, tickets, masks, scales and pages. Each is found."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decode_cases import Cache, check, draw, found_by
from decode_launch import Call
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
B8 = DecodeVariant("bf16", "same", 128, 128, 8)
E32 = DecodeVariant("bf16", "e4m3", 128, 128, 32)
GATHER = replace(E8, load="gather")
MODIFIED = DecodeVariant("fp16", "e4m3", 128, 128, 8, score_mod=True)
SEEDS = range(1, 13)

LOOP, LOADER, MERGE = "decode/mainloop.cuh", "decode/loader.cuh", "decode/merge.cuh"
PAGES = "attention/pages.cuh"
SOFTMAX, RING = "decode/softmax.cuh", "decode/ring.cuh"
ROWS, WORK, CONFIG = "decode/rows.cuh", "decode/work.cuh", "decode/config.cuh"
ARCH, KERNEL, PRODUCTS = "arch/mma_sync.cuh", "decode/kernel.cu", "decode/products.cuh"

FAULTS = (
    # Waits.
    Fault(
        "slot_not_full",
        E8,
        (RING, "ptx::mbarrier_wait(&shared_.full[warp_][state_.stage], state_.parity);", ""),
    ),
    Fault("wrong_parity", E8, (RING, "state_.stage], state_.parity);", "state_.stage], 0);")),
    Fault(
        "fewer_bytes_expected", E8, (LOADER, "int kBytes = kBlockN", "int kBytes = -16 + kBlockN")
    ),
    Fault(
        "copies_not_waited_for",
        GATHER,
        (RING, "copy_async_wait<Config::kSlots - 1>();", "copy_async_wait<Config::kSlots>();"),
    ),
    Fault(
        "empty_groups_left_out",
        GATHER,
        (
            LOADER,
            "ptx::copy_async_commit();  // an empty group",
            "if (more_) ptx::copy_async_commit();  // an empty group",
        ),
    ),
    Fault(
        "clearing_unseen_by_tma",
        E8,
        (RING, "ptx::fence_proxy_async();  // before TMA fills the slot again", ""),
    ),
    Fault(
        "nothing_cleared",
        E8,
        (RING, "make_uint4(0, 0, 0, 0);", "slot[panel * kBlockN * kVectors + vector];"),
    ),
    Fault(
        "q_not_staged_yet",
        E8,
        (KERNEL, "        __syncthreads();\n        Accumulators", "        Accumulators"),
    ),
    Fault(
        "q_of_the_next_unit",
        E32,
        (MERGE, "            });\n            __syncthreads();", "            });"),
    ),
    Fault(
        "parts_not_staged_yet",
        E8,
        (
            MERGE,
            "            stage(sums, first);\n            __syncthreads();",
            "            stage(sums, first);",
        ),
    ),
    Fault(
        "statistics_early",
        E8,
        (
            MERGE,
            "__syncthreads();\n        if (threadIdx.x < kBlockM)",
            "if (threadIdx.x < kBlockM)",
        ),
    ),
    # Tickets and shares.
    Fault("ticket_without_order", E8, (ARCH, "atom.acq_rel.gpu", "atom.relaxed.gpu")),
    Fault("ticket_left", E8, (MERGE, "ptx::store_relaxed(params_.tickets + first, 0);", "")),
    Fault(
        "last_too_early",
        E8,
        (
            MERGE,
            "shared_.is_last = before == segment.last_cta - first;",
            "shared_.is_last = before == segment.last_cta - first - 1;",
        ),
    ),
    Fault("parts_in_one_place", E8, (MERGE, "(starts_there ? 1 : 0)", "0")),
    Fault(
        "last_part_left_out",
        E8,
        (
            MERGE,
            "unroll 4\n            for (int part = 0; part < parts; ++part)",
            "unroll 4\n            for (int part = 0; part < parts - 1; ++part)",
        ),
    ),
    Fault(
        "a_share_too_small",
        E8,
        (
            WORK,
            "max((all + ctas - 1) / ctas, least)",
            "max(all / ctas, least)",
        ),
    ),
    Fault(
        "tiles_lost_between_warps",
        E8,
        (
            WORK,
            "begin + tiles * (team + 1) / Config::kTeams",
            "begin + tiles * (team + 1) / Config::kTeams - (team == 3)",
        ),
    ),
    Fault("rows_without_work", E8, (KERNEL, "    EmptyRows<Config>(params).store();\n", "")),
    # Masks.
    Fault("a_key_too_many", E8, (SOFTMAX, "key(i, h) < end &&", "key(i, h) <= end &&")),
    Fault("a_key_too_few", E8, (SOFTMAX, "key(i, h) >= begin", "key(i, h) > begin")),
    Fault("edge_unmasked", E8, (LOOP, "position < common_begin ||", "")),
    Fault("end_unmasked", E8, (LOOP, "|| position + Config::kBlockN > common_end", "")),
    Fault(
        "padding_shifts_the_mask",
        E8,
        (
            SOFTMAX,
            "int const first = position - sequence.info.offset_k;",
            "int const first = position;",
        ),
    ),
    # Numbers.
    Fault(
        "k_unscaled",
        E8,
        (ROWS, "head_descale<Config>(params.k_descale, params.k_scale_rows, segment)", "1.0f"),
    ),
    Fault("v_unscaled", E8, (MERGE, "factor / total * descale", "factor / total")),
    Fault("power_of_two_forgotten", E8, (ROWS, "descale, scale);", "descale, 1.0f);")),
    Fault("a_scale_vanishes", E8, (ROWS, "* middle, FLT_MIN)", "* middle, 0.0f)")),
    Fault("no_offset", E8, (CONFIG, "? 12.0f : 0.0f", "? 0.0f : 0.0f")),
    Fault(
        "o_not_rescaled",
        E8,
        (
            SOFTMAX,
            "if (__any_sync(0xffffffff, alpha[0] != 1.0f || alpha[1] != 1.0f))",
            "if (false)",
        ),
    ),
    Fault(
        "rescaled_by_the_other_row",
        E8,
        (SOFTMAX, "o[n][c][3] *= alpha[1];", "o[n][c][3] *= alpha[0];"),
    ),
    Fault("a_bf16_place", B8, (PRODUCTS, ": 2 * place + 8 * b;", ": 4 * place + 2 * b;")),
    Fault("an_e4m3_place", E8, (PRODUCTS, "? 4 * place + 2 * b", "? 2 * place + 8 * b")),
    Fault("bytes_not_permuted", E8, (PRODUCTS, "0x3120", "0x3210")),
    Fault(
        "no_sink",
        E8,
        (
            MERGE,
            "float const total = sum * factor + ptx::exp2(sink - safe);",
            "float const total = sum * factor;",
        ),
    ),
    Fault(
        "slope_of_another_key",
        MODIFIED,
        (
            SOFTMAX,
            "distance - static_cast<float>(key(i, h))",
            "distance - static_cast<float>(key(i, 0))",
        ),
    ),
    Fault(
        "padding_shifts_alibi",
        MODIFIED,
        (ROWS, "info.seqlen_q + info.offset_k;", "info.seqlen_q;"),
    ),
    Fault(
        "slope_of_another_head",
        MODIFIED,
        (ROWS, "slope(params.scores, segment.batch, at.head)", "slope(params.scores, 0, 0)"),
    ),
    Fault("mean_of_k_left_out", E8, (MERGE, "* kLn2 + shift;", "* kLn2;")),
    Fault(
        "sink_unmoved", E8, (MERGE, "(sinks[at.head] - shift) * kLog2E", "sinks[at.head] * kLog2E")
    ),
    Fault("mean_unweighted", E8, (MERGE, "shared_.weight[row] * mean[1]", "mean[1]")),
    # Pages.
    Fault(
        "any_page_number",
        GATHER,
        (
            LOADER,
            "bool const exists = place.page >= 0 && place.page < params_.pages.num_pages;",
            "bool const exists = true;",
        ),
    ),
    Fault("any_table_column", GATHER, (PAGES, "if (seen && index < pages.max_pages)", "if (true)")),
    Fault("table_of_the_next_tile", E8, (LOADER, "places_[i] = next_places_[i];", "")),
    Fault("row_in_page", E8, (PAGES, "position - index * pages.page_size};", "position};")),
)
KEPT = tuple(f for f in FAULTS if f.name in ("slot_not_full", "ticket_without_order"))


@functools.cache
def problems(variant: DecodeVariant) -> list[tuple[Call, int]]:
    """Calls and CTAs: ragged pages with padding and sinks, many tiles of one sequence, rows of very
    different sizes, faint keys, and page numbers that are wrong."""
    heads = 16 if variant.rows == 32 else 4
    gathers = variant.load == "gather"
    mod = variant.score_mod
    slopes = {"alibi_slopes": torch.linspace(0.01, 0.1, heads)} if mod else {}
    indices = {"leftpad_k": int32([5, 0, 0, 70, 0])}
    ragged = draw(
        variant,
        (700, 0, 1, 257, 131),
        seqlen_q=2,
        heads=heads,
        window=(150, 0),
        cache=Cache(3 if gathers else 24),
        s_aux=torch.linspace(-1.0, 2.0, heads),
        indices=indices,
        **slopes,
        **_means(variant),
    )
    long = draw(variant, (64 * 70, 64 * 3), heads=heads, seqlen_q=2, causal=True, **slopes)
    if gathers:
        long = draw(variant, (64 * 30, 64 * 3), heads=heads, cache=Cache(1), **slopes)
    sizes = draw(variant, (200, 70), heads=heads, seqlen_q=2, causal=True, **slopes)
    if variant.dtype == "bf16":
        q = sizes.q.clone()
        q[:, 0] *= 1e4
        sizes = replace(sizes, q=q)
    assert ragged.page_table is not None
    table = ragged.page_table.clone()
    table[3, 100 // ragged.k.shape[1]] = table[3, -1] = -5
    table[0, :3] = 2**31 - 1
    calls = [(ragged, 5), (long, 9), (replace(ragged, page_table=table, window=(-1, -1)), 5)]
    if not gathers:
        zeros = replace(sizes, q=sizes.q.clone(), softmax_scale=2.0**-9)
        zeros.q[:, 1] = 0.0
        calls += [(sizes, 3), (_faint(variant, heads), 3), (zeros, 3)]
    return calls


def _means(variant: DecodeVariant) -> dict[str, torch.Tensor]:
    if variant.cache == "same":
        return {}
    generator = torch.Generator().manual_seed(3)
    return {f"{x}_mean": 0.5 * torch.randn(5, 1, 128, generator=generator) for x in "kv"}


def _faint(variant: DecodeVariant, heads: int) -> Call:
    call = draw(variant, (600,), heads=heads)
    k, v, q = torch.zeros_like(call.k.float()), call.v.float(), torch.zeros_like(call.q)
    k[..., 0], k[:, 100, :, 0], v[:, 100], q[..., 0] = -9.0, 0.0, 0.0, 1.0
    given = {"q": q, "k": k.to(call.k.dtype), "v": v.to(call.v.dtype), "softmax_scale": 1.0}
    # O is of a size that fp16 does not round as a subnormal.
    return replace(call, **given, k_descale=torch.tensor(2.0), v_descale=torch.tensor(32.0))


@pytest.mark.parametrize("fault", by_default(FAULTS, KEPT))
def test_fault_is_found(fault: Fault, tmp_path: Path):
    found = found_by(fault, problems(fault.variant), SEEDS, tmp_path)
    assert found is not None, f"{fault.name} is not found under {len(SEEDS)} seeds"
    print(found)


@pytest.mark.parametrize("variant", by_default([E8, B8, E32, GATHER, MODIFIED], [E8]))
def test_without_faults(variant: DecodeVariant):
    """The problems find nothing in the kernel as it is."""
    for call, ctas in problems(variant):
        check(variant, call, ctas=ctas, seeds=(0, 5))
