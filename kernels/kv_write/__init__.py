"""Keys and values of rows of mixed depth to their pages.

Kernel in `kernel`, reference in `naive`.
"""

from ouro_vllm.kernels.kv_write.kernel import kv_write, prepare
from ouro_vllm.kernels.kv_write.naive import kv_write_naive

__all__ = ["kv_write", "kv_write_naive", "prepare"]
