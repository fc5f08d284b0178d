"""vLLM's attention on our kernels (vllm/v1/attention/backend.py): CUDA, ROCm, and the CPU under Triton's interpreter.

A pass over rows of mixed depth comes as `LoopCommonMetadata`, which knows the tables of all loops and what each row
reads; rows of one request are then rows of one tile. Any other metadata is a batch of sequences with one table.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec, is_quantized_kv_cache

from ouro_vllm.kernels.kv_write import kv_write
from ouro_vllm.kernels.loop_attention import Plan, loop_attention, plan


@dataclass
class LoopCommonMetadata(CommonAttentionMetadata):
    """Rows of any depth, each a query of its own; `loop_attention.plan` says what the columns mean.

    tables: block ids int32 [G, B, W] on the device. The others are on the host: request, own, position and window_start
    [num_actual_tokens], shared [B].
    """

    tables: torch.Tensor | None = None
    request: Any = None
    own: Any = None
    position: Any = None
    window_start: Any = None
    shared: Any = None


@dataclass
class LoopMetadata:
    """Of a pass, for all its layers. tables: int32 [G, B, W]."""

    plan: Plan
    tables: torch.Tensor


class LoopMetadataBuilder(AttentionMetadataBuilder[LoopMetadata]):
    """Plans a pass once, on the host."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model = vllm_config.model_config
        heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        self.sizes = {
            "heads": heads or model.get_num_attention_heads(vllm_config.parallel_config),
            "kv_heads": kv_cache_spec.num_kv_heads,
            "head_size": kv_cache_spec.head_size,
            "dtype": model.dtype,
            "device": device,
        }

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LoopMetadata:
        """See vLLM's base class. Sequences of a plain batch read their own pages only."""
        common = common_attn_metadata
        if isinstance(common, LoopCommonMetadata):
            columns = (common.request, common.own, common.position, common.window_start, common.shared)
            return LoopMetadata(plan(*columns, **self.sizes), common.tables)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
        counts = np.diff(starts)
        request = np.repeat(np.arange(common.num_reqs), counts)
        # Exact: this backend does not run under asynchronous scheduling with drafts, where it is only a bound.
        ends = common.seq_lens_cpu_upper_bound[: common.num_reqs].numpy()
        position = ends[request] - starts[request + 1] + np.arange(starts[-1])
        nought = np.zeros(len(request), dtype=np.int32)
        made = plan(request, nought, position, nought, [0] * common.num_reqs, **self.sizes)
        return LoopMetadata(made, common.block_table_tensor[None])


class LoopAttentionImpl(AttentionImpl[LoopMetadata]):
    """One layer's attention: `kv_write`, then `loop_attention`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        """See vLLM's base class.

        Raises:
            ValueError: anything but causal attention to everything before.
        """
        if alibi_slopes or sliding_window or logits_soft_cap or attn_type != AttentionType.DECODER:
            raise ValueError(
                "ouro-vllm's attention backend has neither ALiBi, sliding window, soft cap nor encoder attention. "
                "Start with another --attention-backend."
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values [N, kv_heads, head_size] to slots [N]; kv_cache as in `_caches`."""
        rows = slot_mapping.shape[0]
        scales = layer._k_scale_float, layer._v_scale_float
        kv_write(key[:rows], value[:rows], *self._caches(kv_cache), slot_mapping, *scales)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LoopMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [N, heads, head_size] to what is in the cache, into output; rows of padding stay.

        Raises:
            NotImplementedError: fused quantisation of the output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("ouro-vllm's attention backend does not quantise its output")
        if attn_metadata is None:  # profiling
            return output.zero_()
        rows = attn_metadata.plan.rows.shape[1]
        loop_attention(
            query[:rows],
            *self._caches(kv_cache),
            attn_metadata.tables,
            attn_metadata.plan,
            self.scale,
            layer._k_scale_float,
            layer._v_scale_float,
            out=output[:rows],
        )
        return output

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's cache of a layer, logically [num_blocks, kv_heads, block_size, 2 x head_size], as keys and values."""
        if is_quantized_kv_cache(self.kv_cache_dtype):
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return key_cache, value_cache


class LoopAttentionBackend(AttentionBackend):
    """Chosen by `ouro_vllm.attention`. vLLM wants a name of its registry: CUSTOM, which `--attention-backend` takes."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and 16 <= head_size <= 256

    @staticmethod
    def get_impl_cls() -> type[LoopAttentionImpl]:
        return LoopAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LoopMetadataBuilder]:
        return LoopMetadataBuilder
