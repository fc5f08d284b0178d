"""Writes the keys and values of a pass to their pages: a program handles some heads of one row.

Which loop a row belongs to shows in its slot alone. RoPE is not part of it: vLLM's compiled graph rotates queries and
keys together before the attention layer, and fusing would spare one write and one read of the keys alone.
"""

import torch
import triton
import triton.language as tl

from ouro_vllm.kernels import fp8
from ouro_vllm.kernels.launch import Launch, check_caches

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
) -> None:
    """Stores row n's key and value in slot `slots[n]`.

    key, value: [N, kv_heads, head_size]. key_cache, value_cache: [num_blocks, block_size, kv_heads, head_size], any
    strides; float32, float16, bfloat16 or float8_e4m3fn/fnuz. slots: int64 (or int32) [N], block id x block_size +
    offset; -1 is padding, of which nothing is read or written. k_scale, v_scale: an fp8 cache holds entry / scale,
    saturated.

    Raises:
        TypeError, ValueError: an argument that is not as above.
    """
    prepare(key, value, key_cache, value_cache, slots, k_scale, v_scale).run()


def prepare(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Launch:
    """What `kv_write` runs."""
    if key.dim() != 3 or value.shape != key.shape or slots.shape != key.shape[:1]:
        raise ValueError(
            "kv_write: key and value must be [N, kv_heads, head_size] and slots [N]; they are "
            f"{tuple(key.shape)}, {tuple(value.shape)} and {tuple(slots.shape)}."
        )
    rows, heads, head_size = key.shape
    kind = check_caches("kv_write", key_cache, value_cache, (heads, head_size))
    at_once = min(HEADS_AT_ONCE, triton.next_power_of_2(heads))
    return Launch(
        _kv_write,
        (rows, triton.cdiv(heads, at_once)),
        (
            key,
            value,
            fp8.codes(key_cache),
            fp8.codes(value_cache),
            slots,
            float(k_scale),
            float(v_scale),
            slots.stride(0),
            *key.stride(),
            *value.stride(),
            *key_cache.stride(),
            *value_cache.stride(),
        ),
        {
            "HEADS": heads,
            "HEAD": head_size,
            "HEAD_PAD": triton.next_power_of_2(head_size),
            "BLOCK_SIZE": key_cache.shape[1],
            "AT_ONCE": at_once,
            "FP8": kind,
        },
    )


@triton.jit
def _kv_write(
    key_ptr,
    value_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    k_scale,
    v_scale,
    slots_row,
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
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row * slots_row).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    head = (tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE))[:, None]
    dim = tl.arange(0, HEAD_PAD)[None, :]
    inside = (head < tl.where(slot >= 0, HEADS, 0)) & (dim < HEAD)
    key = tl.load(key_ptr + row * key_row + head * key_head + dim * key_dim, mask=inside, other=0.0)
    value = tl.load(value_ptr + row * value_row + head * value_head + dim * value_dim, mask=inside, other=0.0)
    if FP8:
        key = fp8.encode(key.to(tl.float32) / k_scale, FP8)
        value = fp8.encode(value.to(tl.float32) / v_scale, FP8)
    k = k_ptr + block * k_block + offset * k_slot + head * k_head + dim * k_dim
    v = v_ptr + block * v_block + offset * v_slot + head * v_head + dim * v_dim
    tl.store(k, key.to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(v, value.to(v_ptr.dtype.element_ty), mask=inside)
