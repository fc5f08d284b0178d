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
) -> None:
    """See `kernel.kv_write`; one row after the other."""
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, key_cache.shape[1])
            key_cache[block, offset] = quantise(key[row], k_scale, key_cache.dtype)
            value_cache[block, offset] = quantise(value[row], v_scale, value_cache.dtype)
