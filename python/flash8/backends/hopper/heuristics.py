"""The choices of the Hopper backend that change speed and nothing else.

All of them are arithmetic on sizes that the host knows; none has been tuned on a GPU.
"""

import functools

from flash8.call.options import Options

#: Queries of one head whose five products take about as long as writing, or reading, what a split
#: leaves of dK and dV: 8 d bytes a key of both against 10 d operations a key and query, at 3.3 to
#: 4.8 TB/s and 650 TFLOP/s.
_SUMS_QUERIES = 128
#: What a section's K and V may take of Hopper's 50 MB of L2; Q and O pass through the rest.
_L2_BYTES = 32 << 20
#: Walks over so many packed sequences are short beside what is computed for them.
_MOST_ORDERED = 256


def has_uneven_tiles(options: Options) -> bool:
    """Whether some tiles of queries have more keys than others, so that drawing tiles pays."""
    masked = options.window_left >= 0 or options.window_right >= 0 or options.attention_chunk > 0
    lengths = (options.cu_seqlens_q, options.cu_seqlens_k, options.seqused_q, options.seqused_k)
    return masked or any(x is not None for x in lengths)


@functools.lru_cache(maxsize=4096)
def heads_per_section(seqlen_k: int, bytes_per_key: int, ratio: int) -> int:
    """How many query heads may run side by side with all their K and V in L2.

    `bytes_per_key` is one key with its value, `ratio` the query heads of a KV head.
    """
    fitting = _L2_BYTES // max(1, seqlen_k * bytes_per_key)
    return max(1, fitting) * ratio


def longest_first(sequences: int) -> bool:
    """Whether packed sequences with many keys come first, whose lengths the device reads.

    A walk over the batch for each class of lengths, of which long batches gain little.
    """
    return 1 < sequences <= _MOST_ORDERED


@functools.lru_cache(maxsize=4096)
def packs_query_heads(seqlen_q: int | None, ratio: int, head_dim: int, wanted: bool | None) -> bool:
    """Whether the query heads of a KV head share a tile.

    They do when `wanted`, if the tile's rows are a multiple of `ratio`. Left to choose, they do
    where one head alone would leave rows of its last tile empty (FA3's rule: its rows are used
    less than 0.9 times as well); and for packed sequences (`seqlen_q` None), whose lengths the
    host does not know: short ones gain, and long ones lose nothing, since Q comes by TMA anyway.
    """
    rows = tile_rows(head_dim)
    if ratio == 1 or rows % ratio != 0 or wanted is False:
        return False
    if wanted or seqlen_q is None:
        return True
    return _used(seqlen_q, rows) < 0.9 * _used(seqlen_q * ratio, rows)


def tile_rows(head_dim: int) -> int:
    """kBlockM of the kernels for this head_dim, the wider one of Q and V."""
    return 192 if head_dim <= 64 else 128


def _used(rows: int, block: int) -> float:
    return rows / (block * max(1, -(-rows // block)))


@functools.lru_cache(maxsize=4096)
def loads_in_clusters(seqlen_q: int, ratio: int, head_dim: int, float8: bool) -> bool:
    """Whether two CTAs share the loads of K and V, for dense calls without a mask.

    `ratio` is the query heads in a tile (1 if not packed). As in FA3: for wide heads, in FP8 for
    those of 192 only, and if no CTA of the last cluster would be idle.
    """
    tiles = -(-seqlen_q * ratio // tile_rows(head_dim))
    wide = 128 < head_dim <= 192 if float8 else head_dim >= 128
    return wide and tiles % 2 == 0


def reads_v_colmajor(by_block: bool, head_dim: int, head_dim_v: int) -> bool:
    """Whether the FP8 forward should get V with its keys innermost from a quantizer.

    That costs the quantizer nothing, and no warps transpose V then. At head_dim 128, whose kernels
    ship for both; and not with descales by block, where under a causal mask the loop that overlaps
    P V would have no register left for it (kOverlapPV in hopper/forward/config.cuh).
    """
    return not by_block and all(96 < size <= 128 for size in (head_dim, head_dim_v))


@functools.lru_cache(maxsize=4096)
def head_splits(tiles: int, group: int, seqlen_q: int, multiprocessors: int) -> int:
    """How many CTAs of a backward share the query heads of a KV head, `group` of them.

    One CTA with all heads needs no sum afterwards and reads K and V once. Where `tiles`, the blocks
    of keys of all KV heads, are fewer than the multiprocessors, some of these would have nothing to
    do: then as many splits as make the busiest one's work least, in queries of a head; of equal
    ones the fewest. A CTA writes the sums of its split, and one CTA of a block of keys reads those
    of all its splits. `seqlen_q` is the longest sequence.
    """
    if tiles >= multiprocessors or tiles == 0:
        return 1

    def work(splits: int) -> int:
        waves = -(-tiles * splits // multiprocessors)
        heads = -(-group // splits)
        written, read = (1, splits) if splits > 1 else (0, 0)
        return waves * (heads * seqlen_q + written * _SUMS_QUERIES) + read * _SUMS_QUERIES

    return min(range(1, group + 1), key=work)
