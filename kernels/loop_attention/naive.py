"""Reference of `loop_attention`."""

from collections.abc import Sequence

import torch

from ouro_vllm.kernels.fp8 import dequantise


def loop_attention_naive(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    request: Sequence[int],
    own: Sequence[int],
    position: Sequence[int],
    window_start: Sequence[int],
    shared: Sequence[int],
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """See `kernel.loop_attention` and `tiling.plan`: [N, heads, head_size] float32, one row after the other.

    Each row has two explicit masks over the positions of the table, and what a mask leaves out is never looked at.
    """
    rows, heads, head_size = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    places = torch.arange(tables.shape[2] * block_size, device=query.device)
    output = torch.zeros(rows, heads, head_size, device=query.device)
    for row in range(rows):
        b = int(request[row])
        causal = places <= int(position[row])
        recent = places >= int(window_start[row])
        keys, values = [], []
        for group, mask in ((int(shared[b]), causal & ~recent), (int(own[row]), causal & recent)):
            read = places[mask]
            blocks = tables[group, b, read // block_size].long()
            keys.append(dequantise(key_cache[blocks, read % block_size], k_scale))
            values.append(dequantise(value_cache[blocks, read % block_size], v_scale))
        k = torch.cat(keys).repeat_interleave(heads // kv_heads, dim=1)
        v = torch.cat(values).repeat_interleave(heads // kv_heads, dim=1)
        if len(k):
            weights = torch.einsum("hd,phd->hp", query[row].float() * scale, k).softmax(-1)
            output[row] = torch.einsum("hp,phd->hd", weights, v)
    return output
