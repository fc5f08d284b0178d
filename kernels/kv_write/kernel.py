"""Writes the keys and values of a pass to their pages; with RoPE fused, they and the queries cross memory once.

A program handles some heads of one row: of its keys and values, or (RoPE only) of its query. Which loop a row belongs
to shows in its slot alone.
"""

import torch
import triton
import triton.language as tl

from ouro_vllm.kernels import fp8
from ouro_vllm.kernels.launch import Launch

# Heads of one program.
HEADS_AT_ONCE = 8


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    query: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos_sin: torch.Tensor | None = None,
) -> None:
    """Stores row n's key and value in slot `slots[n]`, rotated first if `cos_sin` is given; `query` rotates in place.

    key, value: [N, kv_heads, head_size]; neither is changed. key_cache, value_cache: [num_blocks, block_size, kv_heads,
    head_size], any strides; float32, float16, bfloat16 or float8_e4m3fn/fnuz. slots: int64 (or int32) [N], block id x
    block_size + offset; -1 is padding, of which nothing is read or written. k_scale, v_scale: an fp8 cache holds
    entry / scale, saturated.

    With RoPE ("neox", the whole head): query [N, heads, head_size]; positions int64 (or int32) [N]; cos_sin
    [max_position, head_size], cosines then sines (vLLM's `RotaryEmbedding.cos_sin_cache`). Rotation is done in float32
    and rounded to the type of key and query.

    Raises:
        TypeError, ValueError: an argument that is not as above.
    """
    for launch in prepare(key, value, key_cache, value_cache, slots, k_scale, v_scale, query, positions, cos_sin):
        launch.run()


def prepare(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    query: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cos_sin: torch.Tensor | None = None,
) -> list[Launch]:
    """What `kv_write` runs."""
    kind = fp8.kind(key_cache.dtype)
    rows, heads, head_size = key.shape
    _, block_size, *entry = key_cache.shape
    if value.shape != key.shape or entry != [heads, head_size] or key_cache.shape != value_cache.shape:
        raise ValueError(
            "kv_write: key and value must be [N, kv_heads, head_size] and the caches [num_blocks, block_size, "
            f"kv_heads, head_size]; they are {tuple(key.shape)}, {tuple(value.shape)}, {tuple(key_cache.shape)} and "
            f"{tuple(value_cache.shape)}."
        )
    if slots.shape != (rows,) or head_size % 2:
        raise ValueError(
            f"kv_write: slots must be [{rows}] and head_size even; they are {tuple(slots.shape)} and {head_size}."
        )
    rope = cos_sin is not None
    if rope:
        if query is None or positions is None:
            raise ValueError("kv_write: RoPE needs query and positions beside cos_sin.")
        if query.shape[::2] != (rows, head_size) or positions.shape != (rows,) or cos_sin.shape[1:] != (head_size,):
            raise ValueError(
                f"kv_write: for key {tuple(key.shape)}, query must be [{rows}, heads, {head_size}], positions [{rows}] "
                f"and cos_sin [max_position, {head_size}] (RoPE of the whole head); they are {tuple(query.shape)}, "
                f"{tuple(positions.shape)} and {tuple(cos_sin.shape)}."
            )
    else:
        # Never read: any tensor does.
        query, positions, cos_sin = key[:, :0], slots, key[0]
    query_heads = query.shape[1]
    at_once = min(HEADS_AT_ONCE, triton.next_power_of_2(max(heads, query_heads)))
    return [
        Launch(
            _kv_write,
            (rows, triton.cdiv(heads, at_once) + triton.cdiv(query_heads, at_once)),
            (
                query,
                key,
                value,
                fp8.codes(key_cache),
                fp8.codes(value_cache),
                slots,
                positions,
                cos_sin,
                float(k_scale),
                float(v_scale),
                slots.stride(0),
                positions.stride(0),
                cos_sin.stride(0),
                cos_sin.stride(1),
                *query.stride(),
                *key.stride(),
                *value.stride(),
                *key_cache.stride(),
                *value_cache.stride(),
            ),
            {
                "HEADS": heads,
                "QUERY_HEADS": query_heads,
                "HALF": head_size // 2,
                "HALF_PAD": triton.next_power_of_2(head_size // 2),
                "BLOCK_SIZE": block_size,
                "AT_ONCE": at_once,
                "ROPE": rope,
                "FP8": kind,
            },
            {"num_warps": 4, "num_stages": 1},
        )
    ]


@triton.jit
def _kv_write(
    query_ptr,
    key_ptr,
    value_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    positions_ptr,
    cos_sin_ptr,
    k_scale,
    v_scale,
    slots_row,
    positions_row,
    angle_row,
    angle_dim,
    query_row,
    query_head,
    query_dim,
    key_row,
    key_head,
    key_dim,
    value_row,
    value_head,
    value_dim,
    k_block,
    k_slot,
    k_head,
    k_dim,
    v_block,
    v_slot,
    v_head,
    v_dim,
    HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + row * slots_row).to(tl.int64)
    written = slot >= 0
    dim = tl.arange(0, HALF_PAD)
    if ROPE:
        position = tl.load(positions_ptr + row * positions_row, mask=written, other=0).to(tl.int64)
        angle = cos_sin_ptr + position * angle_row + dim * angle_dim
        cos = tl.load(angle, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(angle + HALF * angle_dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]

    # Heads are read and written as halves, the pairs that RoPE turns.
    KEY_PARTS: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    if part < KEY_PARTS:
        head = (part * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
        inside = (head < tl.where(written, HEADS, 0)) & (dim < HALF)[None, :]
        source = key_ptr + row * key_row + head * key_head + (dim * key_dim)[None, :]
        first = tl.load(source, mask=inside, other=0.0)
        second = tl.load(source + HALF * key_dim, mask=inside, other=0.0)
        if ROPE:
            x, y = first.to(tl.float32), second.to(tl.float32)
            first = (x * cos - y * sin).to(key_ptr.dtype.element_ty)
            second = (y * cos + x * sin).to(key_ptr.dtype.element_ty)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        target = k_ptr + block * k_block + offset * k_slot + head * k_head + (dim * k_dim)[None, :]
        _store(target, first, inside, k_scale, FP8)
        _store(target + HALF * k_dim, second, inside, k_scale, FP8)

        source = value_ptr + row * value_row + head * value_head + (dim * value_dim)[None, :]
        target = v_ptr + block * v_block + offset * v_slot + head * v_head + (dim * v_dim)[None, :]
        _store(target, tl.load(source, mask=inside, other=0.0), inside, v_scale, FP8)
        second = tl.load(source + HALF * value_dim, mask=inside, other=0.0)
        _store(target + HALF * v_dim, second, inside, v_scale, FP8)
    else:
        if ROPE:
            head = ((part - KEY_PARTS) * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
            inside = (head < tl.where(written, QUERY_HEADS, 0)) & (dim < HALF)[None, :]
            place = query_ptr + row * query_row + head * query_head + (dim * query_dim)[None, :]
            x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(place + HALF * query_dim, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, (x * cos - y * sin).to(query_ptr.dtype.element_ty), mask=inside)
            tl.store(place + HALF * query_dim, (y * cos + x * sin).to(query_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store(target, x, inside, scale, FP8: tl.constexpr):
    if FP8:
        tl.store(target, fp8.encode(x.to(tl.float32) / scale, FP8), mask=inside)
    else:
        tl.store(target, x.to(target.dtype.element_ty), mask=inside)
