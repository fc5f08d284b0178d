"""Triton kernels for looped models, installed as `ouro_vllm.kernels`: a folder per kernel, its reference beside it.

The KV caches of all loops are one pool of pages; which loop wrote a page shows only in the table that names it (see
`ouro_vllm.kv`). Every kernel takes the caches as [num_blocks, block_size, kv_heads, head_size] views with any strides,
so that vLLM's layouts need no copy.
"""
