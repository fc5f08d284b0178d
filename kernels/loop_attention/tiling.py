"""Which rows share a tile, and into how many pieces its KV is split: worked out on the host, once for all layers.

A tile is rows of one request, whatever their depth: shared pages are read once for all of them, own pages once for
those of one depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from ouro_vllm.kernels.launch import current_target, processors

# Splits a tile's KV may have, and positions that a split must read for its second kernel to be worth it.
MOST_SPLITS, LEAST_READ = 64, 256


@dataclass(frozen=True)
class Shape:
    """How the attention kernel is compiled.

    block_m: (row, query head) pairs of a tile, block_n: positions per step. warps, stages: Triton's.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """One launch. table: int32 [T, 4], each tile's first row in `Plan.rows`, number of rows, request, shared group."""

    shape: Shape
    table: torch.Tensor
    splits: int


@dataclass(frozen=True)
class Plan:
    """The rows of a pass, made by `plan`.

    rows: int32 [4, N]: row of the query, own group, position, window start; sorted by request, own group and position.
    groups, requests, positions: how many of each the block tables must have at least. heads, kv_heads, head_size,
    dtype: of the attention it is made for.
    """

    launches: tuple[Tiles, ...]
    rows: torch.Tensor
    groups: int
    requests: int
    positions: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype


def shape_of(target: GPUTarget, dtype: torch.dtype, head_size: int, group: int, many: bool) -> Shape:
    """The kernel's shape for queries of `dtype`, `group` query heads per KV head; many: for more rows than one tile."""
    grouped = triton.next_power_of_2(group)
    wide = triton.next_power_of_2(head_size) > 128
    if dtype == torch.float32:
        # Products in full float32 run on no tensor cores, and take the more registers the larger the tile.
        return Shape(max(16, grouped), 16, 8 if wide else 4, 1)
    old = target.backend == "cuda" and int(target.arch) < 90
    block_m = max((32 if old or wide else 64) if many else 16, grouped)
    # 64 positions at once: their masks alone fill an AMD wave's scalar registers, fp8 decoded by us those of sm_80.
    block_n = 32 if wide or old or (many and target.backend == "hip") else 64
    warps = 8 if many and (wide or not old) else 4
    # The LDS of an AMD unit is 64 KiB, a third of a GPU's shared memory elsewhere.
    stages = 1 if target.backend == "hip" else 2 if wide else 3
    return Shape(block_m, block_n, warps, stages)


def plan(
    request: Sequence[int],
    own: Sequence[int],
    position: Sequence[int],
    window_start: Sequence[int],
    shared: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    splits: int | None = None,
    target: GPUTarget | None = None,
) -> Plan:
    """Tiles for the N rows of a pass over B requests. All sequences are on the host: lists, arrays or CPU tensors.

    request: [N], each row's index into the block tables' requests, in any order. own: [N], the group of the row's loop.
    position: [N], 0-based; -1 for a padding row, whose output is zero. window_start: [N], the first position that the
    row reads from its own loop's pages, rounded down to a block boundary by the caller; before it, it reads the shared
    pages. 0 reads nothing shared; position + 1 nothing own. shared: [B], the group of each request's shared pages.
    splits: of the KV, a power of two; by default as many as fill the device. target: by default this machine's device.

    Raises:
        ValueError: sequences of different lengths, negative indices, head counts or splits that do not fit.
    """
    names = ("request", "own", "position", "window_start")
    columns = [np.asarray(column, dtype=np.int32) for column in (request, own, position, window_start)]
    common = np.asarray(shared, dtype=np.int32)
    if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns):
        shapes = ", ".join(f"{name} {column.shape}" for name, column in zip(names, columns, strict=True))
        raise ValueError(f"loop_attention: rows need one entry in each of {shapes}.")
    if heads % kv_heads or head_size % 16 or not 16 <= head_size <= 256:
        raise ValueError(
            f"loop_attention: heads ({heads}) must be a multiple of kv_heads ({kv_heads}), head_size ({head_size}) a "
            "multiple of 16 up to 256."
        )
    if splits is not None and (splits < 1 or splits & (splits - 1) or splits > MOST_SPLITS):
        raise ValueError(f"loop_attention: splits ({splits}) must be a power of two up to {MOST_SPLITS}.")
    for name, column, least in zip(names, columns, (0, 0, -1, 0), strict=True):
        if column.size and column.min() < least:
            raise ValueError(f"loop_attention: {name} has {column.min()}; the least there is is {least}.")
    if columns[0].size and columns[0].max() >= len(common):
        raise ValueError(f"loop_attention: row of request {columns[0].max()}, but shared groups of {len(common)} only.")

    target, device = target or current_target(), torch.device(device)
    group = heads // kv_heads
    few = shape_of(target, dtype, head_size, group, many=False)
    many = shape_of(target, dtype, head_size, group, many=True)
    order = np.lexsort((columns[2], columns[1], columns[0]))
    request_, own_, position_, start_ = (column[order] for column in columns)
    start_ = np.minimum(start_, position_ + 1)

    sections = _sections(request_, own_, position_, start_)
    tiles, is_many = _cut(sections, len(order), few.block_m // group, many.block_m // group)
    table = np.column_stack([tiles, request_[tiles[:, 0]], common[request_[tiles[:, 0]]]]).astype(np.int32)
    length = _read(tiles[:, 0], own_, position_, start_)
    # One copy to the device for everything.
    packed = np.concatenate([order.astype(np.int32), own_, position_, start_, table.ravel()])
    on_device = torch.from_numpy(packed).to(device, non_blocking=True)
    rows = on_device[: 4 * len(order)].view(4, len(order))
    tables = on_device[4 * len(order) :].view(-1, 4)

    launches = []
    for shape, chosen in ((few, ~is_many), (many, is_many)):
        count = int(chosen.sum())
        if not count:
            continue
        if splits is None:
            wanted = 2 * processors(device) // (count * kv_heads)
            useful = int(length[chosen].max()) // LEAST_READ
            pieces = max(1, min(wanted, useful, MOST_SPLITS))
            pieces = 1 << (pieces.bit_length() - 1)
        # Both kinds of requests in one pass are told apart by index; the rule is one kind, which needs no copy.
        where = slice(None) if count == len(tiles) else torch.from_numpy(np.flatnonzero(chosen)).to(device)
        launches.append(Tiles(shape, tables[where], splits or pieces))
    return Plan(
        launches=tuple(launches),
        rows=rows,
        groups=1 + int(max(own_.max(initial=-1), table[:, 3].max(initial=-1))),
        requests=len(common),
        positions=1 + int(position_.max(initial=-1)),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=dtype,
    )


def _sections(request: np.ndarray, own: np.ndarray, position: np.ndarray, start: np.ndarray) -> np.ndarray:
    """First rows of sections, which tiles do not cross: a request's sorted rows, cut where reading leaves a gap.

    What rows of one group read of a tile is then one interval with no position in it that none of them reads. Windows
    of rows that follow each other always overlap or touch, unless they are empty.
    """
    opens = np.diff(request, prepend=-1) != 0
    runs = np.cumsum(opens | (np.diff(own, prepend=-1) != 0)) << 32
    reads = start <= position
    # How far the rows of the run up to each one read; a run begins with nothing.
    reach = np.maximum.accumulate(runs + np.where(reads, position + 1, 0))
    before = np.maximum(np.concatenate([runs[:1], reach[:-1]]) - runs, 0)
    return np.flatnonzero(opens | (reads & (before > 0) & (start > before)))


def _cut(first: np.ndarray, rows: int, few: int, many: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles [T, 2] (first row, rows) of the sections of `rows` rows, and [T] whether of the kind for many rows.

    Sections that fit into one tile of `few` rows get that, others tiles of `many` rows.
    """
    count = np.diff(first, append=rows)
    size = np.where(count > few, many, few)
    pieces = -(-count // size)
    of = np.repeat(np.arange(len(first)), pieces)
    begin = first[of] + (np.arange(len(of)) - (np.cumsum(pieces) - pieces)[of]) * size[of]
    held = np.minimum(size[of], (first + count)[of] - begin)
    return np.column_stack([begin, held]), (count > few)[of]


def _read(first: np.ndarray, own: np.ndarray, position: np.ndarray, start: np.ndarray) -> np.ndarray:
    """[T] positions whose KV each tile reads; first: [T] its first row. Rows of a tile are sorted by own group."""
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    opens = np.zeros(len(own), dtype=bool)
    opens[first] = True
    opens[1:] |= own[1:] != own[:-1]
    runs = np.flatnonzero(opens)
    reach = np.maximum.reduceat(position + 1, runs) - np.minimum.reduceat(start, runs)
    return np.maximum.reduceat(start, first) + np.add.reduceat(reach, np.searchsorted(runs, first))
