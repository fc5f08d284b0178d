"""Paged attention for rows of mixed depth over two sets of pages: the row's own loop's, and shared ones before those.

Kernel in `kernel`, how rows share tiles in `tiling`, reference in `naive`.
"""

from ouro_vllm.kernels.loop_attention.kernel import loop_attention, prepare
from ouro_vllm.kernels.loop_attention.naive import loop_attention_naive
from ouro_vllm.kernels.loop_attention.tiling import MOST_SPLITS, Plan, plan

__all__ = ["MOST_SPLITS", "Plan", "loop_attention", "loop_attention_naive", "plan", "prepare"]
