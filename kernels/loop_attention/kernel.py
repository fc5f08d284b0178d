"""Paged attention with an online softmax over the KV of one tile of rows, and the sum over its splits.

What a tile reads is a chain of segments: the shared pages before the windows, then own-loop pages, one segment per
group. All run through the same body; what a row reads of a segment is an interval of positions, empty where the segment
is not the row's. A split takes an equal part of the chain, wherever that falls.
"""

import math

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from ouro_vllm.kernels import fp8
from ouro_vllm.kernels.launch import Launch, check_caches, current_target
from ouro_vllm.kernels.loop_attention.tiling import Plan


def loop_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    plan: Plan,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each row to its request's positions up to its own: shared pages before the row's window, own after.

    query: [N, heads, head_size], float32, float16 or bfloat16, row n as given to `tiling.plan`. key_cache, value_cache:
    [num_blocks, block_size, kv_heads, head_size], any strides; of a float type or float8_e4m3fn/fnuz, which holds
    entry / scale. tables: int32 [G, B, W], the block of group g, request b, positions w x block_size and on. scale: of
    the scores. out: like query, written and returned; made if None.

    Pages, and slots of pages, that no row reads may hold anything, NaN too, and their table entries name any block.
    Accumulated in float32; weights are rounded to the query's type before they meet the values.

    Raises:
        TypeError, ValueError: an argument that is not as above, or not what the plan was made for.
    """
    out = torch.empty_like(query) if out is None else out
    for launch in prepare(query, key_cache, value_cache, tables, plan, scale, k_scale, v_scale, out):
        launch.run()
    return out


def prepare(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    plan: Plan,
    scale: float,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
    target: GPUTarget | None = None,
) -> list[Launch]:
    """What `loop_attention` runs. target: by default this machine's device."""
    kind, target = _check(query, key_cache, value_cache, tables, plan, out), target or current_target()
    # Triton converts OCP e4m3 where CUDA does (8.9 and newer), AMD's where the unit does (gfx942).
    hip, arch = target.backend == "hip", str(target.arch)
    native = kind == 2 and arch.startswith("gfx94") if hip else kind == 1 and int(arch) >= 89
    if not native:
        key_cache, value_cache = fp8.codes(key_cache), fp8.codes(value_cache)
    # Plain floats are stored as they are.
    if not kind:
        k_scale = v_scale = 1.0
    rows, heads, padded = plan.rows.shape[1], plan.heads, triton.next_power_of_2(plan.head_size)
    constants = {"HEADS": heads, "HEAD": plan.head_size, "HEAD_PAD": padded}
    launches = []
    for tiles in plan.launches:
        shape, split = tiles.shape, tiles.splits > 1
        # Not read or written without splits: any tensor does.
        sums, stats = out, out
        if split:
            sums = torch.empty(rows, heads, tiles.splits, padded, dtype=torch.float32, device=query.device)
            stats = torch.empty(rows, heads, tiles.splits, 2, dtype=torch.float32, device=query.device)
        attend = Launch(
            _attend,
            (tiles.table.shape[0], plan.kv_heads, tiles.splits),
            (
                query,
                key_cache,
                value_cache,
                out,
                sums,
                stats,
                tables,
                plan.rows,
                tiles.table,
                # The softmax is taken to base 2.
                scale * k_scale * math.log2(math.e),
                float(v_scale),
                rows,
                plan.groups,
                *query.stride(),
                *key_cache.stride(),
                *value_cache.stride(),
                *out.stride(),
                *tables.stride(),
            ),
            constants
            | {
                "GROUP": heads // plan.kv_heads,
                "BLOCK_SIZE": key_cache.shape[1],
                "BLOCK_M": shape.block_m,
                "BLOCK_N": shape.block_n,
                "FP8": 0 if native else kind,
                "SPLIT": split,
                # The interpreter multiplies the bits of bfloat16; a GPU's products of it are exact in float32, too.
                "WIDE": triton.knobs.runtime.interpret and query.dtype == torch.bfloat16,
            },
            # Left alone, ptxas spills a few registers for the sake of occupancy.
            {"num_warps": shape.warps, "num_stages": shape.stages} | ({} if hip else {"maxnreg": 255}),
        )
        launches.append(attend)
        if split:
            combine = (out, sums, stats, plan.rows, tiles.table, *out.stride())
            most = constants | {"SPLITS": tiles.splits}
            launches.append(Launch(_combine, (tiles.table.shape[0], heads), combine, most))
    return launches


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    plan: Plan,
    out: torch.Tensor,
) -> int:
    """`FP8` for the caches. Raises where the arguments do not fit the plan or each other."""
    made_for = (plan.rows.shape[1], plan.heads, plan.head_size)
    if tuple(query.shape) != made_for or query.dtype != plan.dtype or out.shape != query.shape:
        raise ValueError(
            f"loop_attention: the plan is for queries {made_for} of {plan.dtype}; query is {tuple(query.shape)} of "
            f"{query.dtype}, out {tuple(out.shape)}."
        )
    kind = check_caches("loop_attention", key_cache, value_cache, (plan.kv_heads, plan.head_size))
    least = (plan.groups, plan.requests, -(-plan.positions // key_cache.shape[1]))
    if tables.dim() != 3 or tables.dtype != torch.int32 or any(a < b for a, b in zip(tables.shape, least, strict=True)):
        raise ValueError(
            f"loop_attention: the rows need block tables int32 [G, B, W] of at least {least}; they are "
            f"{tables.dtype} {tuple(tables.shape)}."
        )
    return kind


@triton.jit
def _reads(segment, own, position, start):
    """What is read of a segment (0 is the shared one, g + 1 that of own group g), positions from low on, before high.

    Returns (low, high) of each row, then of any row of the tile; nothing is (large, 0) there.
    """
    is_shared = segment == 0
    mine = own == segment - 1
    low = tl.where(is_shared, 0, tl.where(mine, start, 0))
    high = tl.where(is_shared, start, tl.where(mine, position + 1, 0))
    reads = low < high
    return low, high, tl.min(tl.where(reads, low, 0x7FFFFFFF)), tl.max(tl.where(reads, high, 0))


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    query_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sums_ptr,
    stats_ptr,
    tables_ptr,
    rows_ptr,
    tiles_ptr,
    score_scale,
    value_scale,
    rows,
    groups,
    query_row,
    query_head,
    query_dim,
    k_block,
    k_slot,
    k_head,
    k_dim,
    v_block,
    v_slot,
    v_head,
    v_dim,
    out_row,
    out_head,
    out_dim,
    table_group,
    table_request,
    table_block,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(tiles_ptr + tile * 4)
    count = tl.load(tiles_ptr + tile * 4 + 1)
    request = tl.load(tiles_ptr + tile * 4 + 2).to(tl.int64)
    shared = tl.load(tiles_ptr + tile * 4 + 3)

    # The query heads of a KV head are rows of the tile, too.
    m = tl.arange(0, BLOCK_M)
    valid = m // GROUP < count
    at = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    row = tl.load(rows_ptr + at, mask=valid, other=0).to(tl.int64)
    own = tl.load(rows_ptr + rows + at, mask=valid, other=-1)
    position = tl.load(rows_ptr + 2 * rows + at, mask=valid, other=-1)
    start = tl.load(rows_ptr + 3 * rows + at, mask=valid, other=0)

    dim = tl.arange(0, HEAD_PAD)
    held = valid[:, None] & (dim < HEAD)[None, :]
    q = tl.load(
        query_ptr + (row * query_row + head * query_head)[:, None] + (dim * query_dim)[None, :], mask=held, other=0.0
    )

    # This split's part of the chain; from_step and to_step count over all segments.
    from_step, to_step = 0, 0x7FFFFFFF
    if SPLIT:
        steps = 0
        for segment in range(0, groups + 1):
            _, _, begin, end = _reads(segment, own, position, start)
            steps += tl.maximum(tl.cdiv(end, BLOCK_N) - begin // BLOCK_N, 0)
        mine = tl.cdiv(steps, tl.num_programs(2))
        from_step = split * mine
        to_step = tl.minimum(from_step + mine, steps)

    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK_M], dtype=tl.float32)
    total = tl.zeros([BLOCK_M, HEAD_PAD], dtype=tl.float32)
    passed = 0
    for segment in range(0, groups + 1):
        low, high, begin, end = _reads(segment, own, position, start)
        width = tl.maximum(high - low, 0).to(tl.uint32, bitcast=True)
        step = begin // BLOCK_N
        here = tl.maximum(tl.cdiv(end, BLOCK_N) - step, 0)
        group = tl.where(segment == 0, shared, segment - 1).to(tl.int64)
        table = tables_ptr + group * table_group + request * table_request
        for n_step in range(step + tl.maximum(from_step - passed, 0), step + tl.minimum(to_step - passed, here)):
            n = n_step * BLOCK_N + tl.arange(0, BLOCK_N)
            # A weight of zero would not silence a NaN. Inside, some row reads every position (`tiling.plan`).
            inside = (n >= begin) & (n < end)
            block = tl.load(table + (n // BLOCK_SIZE) * table_block, mask=inside, other=0).to(tl.int64)
            slot = n % BLOCK_SIZE
            k = tl.load(
                k_ptr + (block * k_block + slot * k_slot + kv_head * k_head)[None, :] + (dim * k_dim)[:, None],
                mask=inside[None, :] & (dim < HEAD)[:, None],
                other=0.0,
            )
            v = tl.load(
                v_ptr + (block * v_block + slot * v_slot + kv_head * v_head)[:, None] + (dim * v_dim)[None, :],
                mask=inside[:, None] & (dim < HEAD)[None, :],
                other=0.0,
            )
            if FP8:
                k, v = fp8.decode(k, FP8), fp8.decode(v, FP8)
            k, v = k.to(q.dtype), v.to(q.dtype)
            # One comparison for both bounds: on AMD each holds scalar registers until the scores are there.
            seen = (n[None, :] - low[:, None]).to(tl.uint32, bitcast=True) < width[:, None]

            scores = tl.where(seen, _dot(q, k, WIDE) * score_scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            # A row that has seen nothing so far must not subtract infinity from infinity.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            shrink = tl.exp2(peak - base)
            weights = tl.exp2(scores - base[:, None])
            weight = weight * shrink + tl.sum(weights, axis=1)
            total = total * shrink[:, None] + _dot(weights.to(q.dtype), v, WIDE)
            peak = new_peak
        passed += here

    if SPLIT:
        place = (at.to(tl.int64) * HEADS + head) * tl.num_programs(2) + split
        tl.store(stats_ptr + place * 2, peak, mask=valid)
        tl.store(stats_ptr + place * 2 + 1, weight, mask=valid)
        tl.store(sums_ptr + place[:, None] * HEAD_PAD + dim[None, :], total * value_scale, mask=held)
    else:
        result = total * (value_scale / tl.where(weight == 0.0, 1.0, weight))[:, None]
        tl.store(
            out_ptr + (row * out_row + head * out_head)[:, None] + (dim * out_dim)[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=held,
        )


@triton.jit
def _combine(
    out_ptr,
    sums_ptr,
    stats_ptr,
    rows_ptr,
    tiles_ptr,
    out_row,
    out_head,
    out_dim,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """out = sum of the splits' sums / sum of their weights, both brought to the highest peak."""
    first = tl.load(tiles_ptr + tl.program_id(0) * 4)
    count = tl.load(tiles_ptr + tl.program_id(0) * 4 + 1)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_PAD)
    for member in range(0, count):
        at = first + member
        place = (at.to(tl.int64) * HEADS + head) * SPLITS + split
        peak = tl.load(stats_ptr + place * 2)
        highest = tl.max(peak)
        share = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
        weight = tl.sum(tl.load(stats_ptr + place * 2 + 1) * share)
        sums = tl.load(sums_ptr + place[:, None] * HEAD_PAD + dim[None, :], mask=(dim < HEAD)[None, :], other=0.0)
        result = tl.sum(sums * share[:, None], axis=0) / tl.where(weight == 0.0, 1.0, weight)
        row = tl.load(rows_ptr + at).to(tl.int64)
        tl.store(
            out_ptr + row * out_row + head * out_head + dim * out_dim,
            result.to(out_ptr.dtype.element_ty),
            mask=dim < HEAD,
        )
