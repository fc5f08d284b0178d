"""Reference of `kv_write`."""

import torch

from ouro_vllm.kernels.fp8 import quantise


def kv_write_naive(
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
    """See `kernel.kv_write`; one row after the other."""
    block_size = key_cache.shape[1]
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        k = key[row]
        if cos_sin is not None:
            cos, sin = cos_sin[positions[row]].float().chunk(2)
            k = rotate(k, cos, sin)
            query[row] = rotate(query[row], cos, sin)
        block, offset = divmod(slot, block_size)
        key_cache[block, offset] = quantise(k, k_scale, key_cache.dtype)
        value_cache[block, offset] = quantise(value[row], v_scale, value_cache.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, the halves of a head as pairs ("neox"): x [..., D] by cos, sin [D / 2], in float32, as x's type."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
