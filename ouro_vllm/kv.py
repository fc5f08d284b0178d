"""Where the loops' keys and values stand, and what sharing across loops frees and publishes.

Rows of any loop go through one attention call on one cache tensor per physical layer, so block ids alone have to tell
the loops apart. vLLM puts layers of equal specs into one group with one block table, and the caches of all layers into
one allocation, at regular distances (vllm/v1/kv_cache_interface.py, `KVCacheTensor`). So without sharing all loops are
in one group, as in plain decoding, and the ids of a loop follow from its distance (`Pool`). Under sharing loops free
blocks apart from each other: each has a spec of its own and so a group of its own, and the caches of a layer's loops
are the same bytes (vllm/v1/core/kv_cache_utils.py, `_get_kv_cache_groups_uniform_page_size`,
`get_kv_cache_config_from_groups`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
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


class WavefrontManager(FullAttentionManager):
    """Publishes no block to prefix caching that not all loops have written yet.

    Under the exit gate tokens are committed while their deeper loops are still to come.
    """

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, under the exit gate of what is complete."""
        tally = getattr(request, "ouro_depth", None)  # see `tally`
        if tally is not None and tally.depth.gated:
            done = complete(tally.depth.loops, request.num_prompt_tokens, request.num_computed_tokens)
            num_tokens = min(num_tokens, done)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


class LoopManager(SharedManager):
    """Blocks of one loop under sharing. Those before the window go once the prompt is done.

    A prefix is found only where every group has it.

    Attributes:
        requests: the scheduler's, by id; most_tokens: in one step. Both are set by `OuroScheduler`.
    """

    def __init__(self, kv_cache_spec: "LoopSpec", *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.sharing = Sharing(LAST, kv_cache_spec.window, self.block_size)
        self.requests: Mapping[str, Any] = {}
        self.most_tokens = 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what no row from `processed_computed_tokens` on reads."""
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
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
        if apply_admission_cap and request_id in self.requests:
            prompt = self.requests[request_id].num_prompt_tokens
            num_tokens = min(num_tokens, prompt + self.sharing.window + self.most_tokens + self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )


@register_kv_cache_spec(manager_class=LoopManager)
@dataclass(frozen=True, kw_only=True)
class LoopSpec(FullAttentionSpec):
    """Full attention of one loop. Beside it there is always a group of another kind, which holds the groups apart.

    loop: 1-based. window: of `Sharing`.
    """

    loop: int
    window: int

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


@register_kv_cache_spec(manager_class=WavefrontManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class WavefrontSpec(FullAttentionSpec):
    """Full attention of every loop, of a server whose rows run ahead."""


class WavefrontAttention(Attention):
    """vLLM's attention layer, in a server whose rows run ahead."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The layer's own spec, of a kind of its own."""
        return WavefrontSpec(**fields(self, super().get_kv_cache_spec(vllm_config)))


class LoopAttention(Attention):
    """vLLM's attention layer, whose KV cache belongs to one loop's group."""

    loop: int
    window: int

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


@dataclass(frozen=True)
class Pool:
    """The caches of all loops, seen as one cache per physical layer.

    groups: vLLM's KV group of each loop. Block k of its table is block k * per_block + (loop - 1) * per_loop here.
    caches: [blocks, heads, tokens, 2 * size], per physical layer, in vLLM's own memory.

    vLLM keeps the blocks of all layers side by side, block by block, or those of each layer in one piece. Of one layer,
    L layers and R loops, with B blocks in the pool, that is

        block 0 of all loops, block 1 of all loops, ...:   per_block = R * L, per_loop = L
        all blocks of loop 1, all blocks of loop 2, ...:   per_block = 1,     per_loop = B * L

    each over the largest unit that both distances are multiples of; where loops share KV their caches are the same
    bytes, and per_loop is 0.
    """

    groups: list[int]
    per_block: int
    per_loop: int
    caches: list[torch.Tensor]

    @classmethod
    def of(cls, config: KVCacheConfig, names: Sequence[Sequence[str]], layers: Mapping[str, Any]) -> Self:
        """names: attention layers per loop; layers: vLLM's attention layers by name, with their caches.

        Raises:
            ValueError: attention cuts vLLM's blocks into smaller ones, which would be found elsewhere.
            RuntimeError: the loops of a layer do not stand at regular distances, as mixed-depth passes need it.
        """
        group_of = {name: number for number, group in enumerate(config.kv_cache_groups) for name in group.layer_names}
        groups = [group_of[loop[0]] for loop in names]
        if any(group_of[name] != group for loop, group in zip(names, groups, strict=True) for name in loop):
            raise RuntimeError(f"vLLM did not keep the layers of a loop in one KV group: {group_of}.")
        block = config.kv_cache_groups[groups[0]].kv_cache_spec.block_size
        cut = layers[names[0][0]].kv_cache.shape[2]
        if cut != block:
            raise ValueError(
                f"--block-size {block}: the attention backend works on blocks of {cut} tokens, and self-speculation "
                f"and KV sharing need the same ones everywhere. Start with --block-size {cut}."
            )
        own = len(set(groups)) == len(names)
        steps, caches = set(), []
        for same in zip(*names, strict=True):
            first, *others = [layers[name].kv_cache for name in same]
            distance = (others[0].data_ptr() - first.data_ptr()) // first.element_size() if others else 0
            for number, other in enumerate(others, start=1):
                away = other.data_ptr() - first.data_ptr() - number * distance * first.element_size()
                alike = (other.dtype, other.shape, other.stride()) == (first.dtype, first.shape, first.stride())
                if away or not alike or own != (distance == 0):
                    raise RuntimeError(
                        f"The KV caches of {same[0]} and {same[number]} are not alike or do not stand at a regular "
                        "distance, which self-speculation and KV sharing need. Start without "
                        "--kv-cache-dtype-skip-layers if it is set, otherwise without these two."
                    )
            unit = gcd(first.stride(0), distance)
            per_block, per_loop = first.stride(0) // unit, distance // unit
            steps.add((per_block, per_loop))
            blocks = (first.shape[0] - 1) * per_block + len(others) * per_loop + 1
            caches.append(first.as_strided((blocks, *first.shape[1:]), (unit, *first.stride()[1:])))
        if len(steps) != 1:
            raise RuntimeError(f"The KV caches of different layers do not have the same distances: {sorted(steps)}.")
        return cls(groups, *steps.pop(), caches)

    def ids(self, tables: Sequence[torch.Tensor]) -> torch.Tensor:
        """Block ids [G, B, W], of loop g + 1, of vLLM's tables [B, W], one per loop."""
        if len(set(self.groups)) > 1:
            return torch.stack(list(tables))
        return tables[0] * self.per_block + self._away

    @cached_property
    def _away(self) -> torch.Tensor:
        """How far each loop's blocks are from those of the first, [R, 1, 1]."""
        loops = torch.arange(len(self.groups), dtype=torch.int32, device=self.caches[0].device)
        return (loops * self.per_loop)[:, None, None]


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
