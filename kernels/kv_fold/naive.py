"""Reference of `kv_fold`."""

import torch

from ouro_vllm.kernels.fp8 import dequantise, quantise


def kv_fold_naive(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See `kernel.kv_fold`; one block after the other, in float32."""
    for blocks, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
        present = [block for block in blocks if block >= 0]
        if destination < 0 or not present:
            continue
        for cache, scale in ((key_cache, k_scale), (value_cache, v_scale)):
            mean = dequantise(cache[present], scale).sum(0) / len(present)
            cache[destination] = quantise(mean, scale, cache.dtype)
