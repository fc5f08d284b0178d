"""One KV group per loop step, all in one pool, and what sharing across loops frees and publishes.

vLLM puts layers of equal specs into one group with one block table. Loops that are to have block tables of their own
get specs that differ in a field; groups of the same page size share one pool, so that the cache tensor of a physical
layer is the same for every loop and only block ids tell the loops apart (vllm/v1/core/kv_cache_utils.py,
`_get_kv_cache_groups_uniform_page_size` and `get_kv_cache_config_from_groups`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from ouro_vllm.sharing import LAST, Sharing
from ouro_vllm.wavefront.flight import complete


class SharedManager(FullAttentionManager):
    """Keeps every block, and publishes only those of the prompt to prefix caching.

    What a generated token leaves depends on where its prompt ended, which a block's hash does not tell.
    """

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, of the prompt."""
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)


class LoopManager(FullAttentionManager):
    """Blocks of one loop. Under sharing those before the window go once the prompt is done.

    A prefix is found only where every group has it, so that the groups of the loops below the last are enough to hold
    back blocks that not all loops have written yet.

    Attributes:
        requests: the scheduler's, by id; most_tokens: in one step. Both are set by `OuroScheduler`.
    """

    def __init__(self, kv_cache_spec: "LoopSpec", *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        window = kv_cache_spec.window
        self.sharing = None if window is None else Sharing(LAST, window, self.block_size)
        self.requests: Mapping[str, Any] = {}
        self.most_tokens = 0

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; under sharing of the prompt (see `SharedManager`), under the exit gate what is complete."""
        if self.sharing is not None:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        tally = getattr(request, "ouro_depth", None)  # see `tally`
        if tally is not None and tally.depth.gated:
            done = complete(tally.depth.loops, request.num_prompt_tokens, request.num_computed_tokens)
            num_tokens = min(num_tokens, done)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what no row from `processed_computed_tokens` on reads."""
        if self.sharing is None or num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        start = self.sharing.start(processed_computed_tokens, num_prompt_tokens)
        self._remove_blocks_in_range(request_id, 0, start // self.block_size)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """As vLLM does. What has to fit for a request to be let in is what it can hold at once.

        That matters where one comes back after preemption: it is computed again from its first token, but never holds
        all it had generated.
        """
        if apply_admission_cap and self.sharing is not None and request_id in self.requests:
            prompt = self.requests[request_id].num_prompt_tokens
            num_tokens = min(num_tokens, prompt + self.sharing.window + self.most_tokens + self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )


@register_kv_cache_spec(manager_class=LoopManager)
@dataclass(frozen=True, kw_only=True)
class LoopSpec(FullAttentionSpec):
    """Full attention of one loop. Beside it there is always a group of another kind, which holds the groups apart.

    loop: 1-based. window: of `Sharing`; None where loops share nothing.
    """

    loop: int
    window: int | None = None

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Only layers of one loop share a group. Raises AssertionError otherwise, which vLLM takes for a no."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("KV caches of different loops do not share block tables")
        return specs[0]


@register_kv_cache_spec(manager_class=SharedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class SharedSpec(FullAttentionSpec):
    """What all loops read before their windows: the last loop's own keys and values, or the mean over all loops'."""


class LoopAttention(Attention):
    """vLLM's attention layer, whose KV cache belongs to one loop's group."""

    loop: int
    window: int | None = None

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The layer's own spec, marked with its loop."""
        return LoopSpec(**fields(self, super().get_kv_cache_spec(vllm_config)), loop=self.loop, window=self.window)


class SharedAttention(Attention):
    """vLLM's attention layer, whose KV cache all loops read."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The layer's own spec, marked as shared."""
        return SharedSpec(**fields(self, super().get_kv_cache_spec(vllm_config)))


def fields(layer: Attention, spec: KVCacheSpec | None) -> dict[str, Any]:
    """The fields of a spec of full attention. Raises TypeError on any other."""
    if type(spec) is not FullAttentionSpec:
        raise TypeError(f"Ouro's layers have full attention; vLLM made {type(spec).__name__} of {layer.layer_name}.")
    return vars(spec)


def groups_by_loop(kv_cache_config: KVCacheConfig, names: Sequence[Sequence[str]], layers: dict[str, Any]) -> list[int]:
    """The KV group of each loop; names: attention layers per loop; layers: vLLM's attention layers by name.

    Raises:
        RuntimeError: vLLM did not make one group per loop over one pool, as mixed-depth passes need it.
    """
    found = []
    for wanted in names:
        ids = [i for i, group in enumerate(kv_cache_config.kv_cache_groups) if set(group.layer_names) == set(wanted)]
        found += ids
        if len(ids) != 1:
            raise RuntimeError(
                f"vLLM made no KV group of its own for the loop with layer {wanted[0]}. Self-speculation and KV "
                "sharing need one per loop. Start without --disable-hybrid-kv-cache-manager, or without both."
            )
    for same in zip(*names, strict=True):
        if len({layers[name].kv_cache.data_ptr() for name in same}) != 1:
            raise RuntimeError(f"{same[0]} and {same[-1]} have separate caches; loops need one pool.")
    return found


def fold(cache: torch.Tensor, own: torch.Tensor, shared: torch.Tensor) -> None:
    """Write the mean over loops, block by block, on one layer's cache.

    cache: [blocks, ...], in whatever order a block keeps its tokens: it is the same in all blocks.
    own: block ids [K, R] of the loops. shared: block ids [K] of the destinations.
    """
    cache[shared] = cache[own].mean(dim=1, dtype=torch.float32).to(cache.dtype)


def decoding_capacity(blocks: int, block_size: int, context: int, window: int, ahead: int, windowed: int) -> int:
    """Tokens of long answers that fit a cache of `blocks`: of requests that have generated up to `context` tokens.

    window: of `Sharing`. ahead: slots reserved beyond the newest token. windowed: groups that keep a window only.
    """
    whole = -(-context // block_size)
    recent = min(whole, -(-(window + ahead) // block_size) + 1)
    return int(blocks / (whole + windowed * recent) * context)
