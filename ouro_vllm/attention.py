"""Which attention backend serves Ouro's layers: our kernels, or what vLLM chooses."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata

OWN = "ouro_vllm.kernels.backend.LoopAttentionBackend"


def register() -> None:
    """Give our backend vLLM's name for one that is not its own, unless another plugin has taken it."""
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, OWN)


def own_backend(vllm_config: "VllmConfig", shares: bool) -> "type[AttentionBackend] | None":
    """Our backend for a server's attention layers, None for vLLM's choice; shares: loops share KV.

    On GPUs it is ours if loops share KV and the user named no backend (`--attention-backend CUSTOM` is ours too, see
    `register`). On the CPU, where vLLM's C++ attention is faster by far, only under Triton's interpreter.
    """
    if current_platform.is_cuda_alike():
        wanted = shares and vllm_config.attention_config.backend is None
    else:
        wanted = current_platform.is_cpu() and _interpreting()
    if not wanted:
        return None
    from ouro_vllm.kernels.backend import LoopAttentionBackend

    return LoopAttentionBackend


def at_other_blocks(
    builder: "AttentionMetadataBuilder", metadata: Any, common: "CommonAttentionMetadata"
) -> Any | None:
    """Metadata of the same sequences whose keys and values stand elsewhere; None where the backend has to build anew.

    metadata: what `builder` made for them. common: theirs, with the new block table and slots.
    """
    table, slots = common.block_table_tensor, common.slot_mapping
    if builder.supports_update_block_table:
        return builder.update_block_table(metadata, table, slots)
    if current_platform.is_cpu() and not is_own(type(metadata)):
        # vLLM's CPU backend lacks the method only: nothing else in its metadata knows of blocks (cpu_attn.py, `build`).
        return replace(metadata, block_table=table, slot_mapping=slots)
    return None


def is_own(backend: type) -> bool:
    """Whether a backend, or what it makes, is that of our kernels."""
    return backend.__module__ == OWN.rpartition(".")[0]


def _interpreting() -> bool:
    # Triton, which the CPU build of vLLM can do without, is not imported to be told that it is off.
    if "TRITON_INTERPRET" not in os.environ:
        return False
    import triton

    return triton.knobs.runtime.interpret
