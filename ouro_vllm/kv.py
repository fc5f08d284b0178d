"""One KV group per loop step, all in one pool.

vLLM puts layers of equal specs into one group with one block table. Loops that are to have block tables of their own
get specs that differ in a field; groups of the same page size share one pool, so that the cache tensor of a physical
layer is the same for every loop and only block ids tell the loops apart (vllm/v1/core/kv_cache_utils.py,
`_get_kv_cache_groups_uniform_page_size` and `get_kv_cache_config_from_groups`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from ouro_vllm.wavefront.flight import complete


class LoopManager(FullAttentionManager):
    """Publishes blocks of a request under the exit gate only once all its loops have written them.

    A prefix is found only where every group has it, so that the groups of the loops below the last are enough.
    """

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, up to where the request (vLLM's v1 Request) is complete."""
        tally = getattr(request, "ouro_depth", None)  # see `tally`
        if tally is not None and tally.depth.gated:
            done = complete(tally.depth.loops, request.num_prompt_tokens, request.num_computed_tokens)
            num_tokens = min(num_tokens, done)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


@register_kv_cache_spec(manager_class=LoopManager)
@dataclass(frozen=True, kw_only=True)
class LoopSpec(FullAttentionSpec):
    """Full attention of one loop below the last. The last keeps the plain spec, which is what holds the groups apart.

    loop: 1-based.
    """

    loop: int

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Only layers of one loop share a group. Raises AssertionError otherwise, which vLLM takes for a no."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("KV caches of different loops do not share block tables")
        return specs[0]


class LoopAttention(Attention):
    """vLLM's attention layer, whose KV cache belongs to one loop's group."""

    loop: int

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The layer's own spec, marked with its loop."""
        spec = super().get_kv_cache_spec(vllm_config)
        if type(spec) is not FullAttentionSpec:
            raise TypeError(f"Ouro's layers have full attention; vLLM made {type(spec).__name__} of one.")
        return LoopSpec(**vars(spec), loop=self.loop)


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
                f"vLLM made no KV group of its own for the loop with layer {wanted[0]}. Self-speculation needs one "
                "per loop. Start without --disable-hybrid-kv-cache-manager, or without --speculative-config."
            )
    for same in zip(*names, strict=True):
        if len({layers[name].kv_cache.data_ptr() for name in same}) != 1:
            raise RuntimeError(f"{same[0]} and {same[-1]} have separate caches; self-speculation needs one pool.")
    return found
