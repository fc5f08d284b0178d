"""Entries that leave the window become the shared entry: the mean of all loops' own (policy `average`).

Kernel in `kernel`, reference in `naive`.
"""

from ouro_vllm.kernels.kv_fold.kernel import kv_fold, prepare
from ouro_vllm.kernels.kv_fold.naive import kv_fold_naive

__all__ = ["kv_fold", "kv_fold_naive", "prepare"]
