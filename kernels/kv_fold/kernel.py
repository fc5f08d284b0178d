"""The mean of R blocks into one, for many blocks at once.

A program handles some (slot, head) pairs of one block: it reads them from every source before it writes them, so the
destination may be one of its own sources.
"""

import torch
import triton
import triton.language as tl

from ouro_vllm.kernels import fp8
from ouro_vllm.kernels.launch import Launch, check_caches

# (slot, head) pairs of one program.
PAIRS = 16


def kv_fold(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Writes to each destination block the mean over its source blocks, slot by slot, for one layer's cache.

    To be called once per block, when all its slots are written in all sources; the destination must be a block that
    nothing but this request reads (neither hashed nor shared), and no source of another fold in the call.

    key_cache, value_cache: [num_blocks, block_size, kv_heads, head_size], any strides; float32, float16, bfloat16 or
    float8_e4m3fn/fnuz. sources: int32 [F, R] block ids, -1 for a loop that has no part in the mean (a request of lower
    depth). destinations: int32 [F] block ids; -1 (padding), or no source at all: nothing is written. k_scale, v_scale:
    of an fp8 cache; entries and mean have the same scale, so the mean of the codes' values is rounded as the mean of
    the entries would be, and the scales themselves are not needed.

    Raises:
        TypeError, ValueError: a cache or a table that is not as above.
    """
    prepare(key_cache, value_cache, sources, destinations).run()


def prepare(
    key_cache: torch.Tensor, value_cache: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor
) -> Launch:
    """What `kv_fold` runs."""
    kind = check_caches("kv_fold", key_cache, value_cache)
    if sources.dim() != 2 or destinations.shape != sources.shape[:1]:
        raise ValueError(
            f"kv_fold: sources must be [F, R] and destinations [F]; they are {tuple(sources.shape)} and "
            f"{tuple(destinations.shape)}."
        )
    folds, loops = sources.shape
    _, block_size, heads, head_size = key_cache.shape
    return Launch(
        _kv_fold,
        (folds, triton.cdiv(block_size * heads, PAIRS), 2),
        (
            fp8.codes(key_cache),
            fp8.codes(value_cache),
            sources,
            destinations,
            *sources.stride(),
            destinations.stride(0),
            *key_cache.stride(),
            *value_cache.stride(),
        ),
        {
            "LOOPS": loops,
            "HEADS": heads,
            "HEAD": head_size,
            "HEAD_PAD": triton.next_power_of_2(head_size),
            "BLOCK_SIZE": block_size,
            "PAIRS": PAIRS,
            "FP8": kind,
        },
    )


@triton.jit
def _kv_fold(
    k_ptr,
    v_ptr,
    sources_ptr,
    destinations_ptr,
    source_fold,
    source_loop,
    destination_fold,
    k_block,
    k_slot,
    k_head,
    k_dim,
    v_block,
    v_slot,
    v_head,
    v_dim,
    LOOPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    FP8: tl.constexpr,
):
    fold = tl.program_id(0)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    dim = tl.arange(0, HEAD_PAD)
    slot, head = pair // HEADS, pair % HEADS
    if tl.program_id(2) == 0:
        _fold_one(
            k_ptr + (slot * k_slot + head * k_head)[:, None] + (dim * k_dim)[None, :],
            k_block, sources_ptr + fold * source_fold, source_loop, destinations_ptr + fold * destination_fold,
            pair, dim, BLOCK_SIZE * HEADS, LOOPS, HEAD, HEAD_PAD, PAIRS, FP8,
        )  # fmt: skip
    else:
        _fold_one(
            v_ptr + (slot * v_slot + head * v_head)[:, None] + (dim * v_dim)[None, :],
            v_block, sources_ptr + fold * source_fold, source_loop, destinations_ptr + fold * destination_fold,
            pair, dim, BLOCK_SIZE * HEADS, LOOPS, HEAD, HEAD_PAD, PAIRS, FP8,
        )  # fmt: skip


@triton.jit
def _fold_one(
    entries,
    block_stride,
    sources,
    source_loop,
    destination_ptr,
    pair,
    dim,
    ALL: tl.constexpr,
    LOOPS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    FP8: tl.constexpr,
):
    """entries: pointers [PAIRS, HEAD_PAD] into block 0. pair, dim: what they point at, of ALL pairs and HEAD dims."""
    total = tl.zeros([PAIRS, HEAD_PAD], dtype=tl.float32)
    count = 0
    for loop in tl.static_range(LOOPS):
        block = tl.load(sources + loop * source_loop).to(tl.int64)
        inside = (pair < tl.where(block >= 0, ALL, 0))[:, None] & (dim < HEAD)[None, :]
        entry = tl.load(entries + block * block_stride, mask=inside, other=0)
        total += (fp8.decode(entry, FP8) if FP8 else entry).to(tl.float32)
        count += (block >= 0).to(tl.int32)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    destination = tl.load(destination_ptr).to(tl.int64)
    if FP8:
        mean = fp8.encode(mean, FP8)
    inside = (pair < tl.where((destination >= 0) & (count > 0), ALL, 0))[:, None] & (dim < HEAD)[None, :]
    tl.store(entries + destination * block_stride, mean.to(entries.dtype.element_ty), mask=inside)
