"""The caches of all loops as one pool, on memory that vLLM laid out: without an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from ouro_vllm.kv import LoopSpec, Pool, SharedSpec, WavefrontSpec

LAYERS, LOOPS, BLOCKS = 3, 4, 7
SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
NAMES = [[f"layers.{loop * LAYERS + layer}.attn" for layer in range(LAYERS)] for loop in range(LOOPS)]
BY_LAYER = [name for same in zip(*NAMES, strict=True) for name in same]
BY_LOOP = [name for names in NAMES for name in names]


def laid_out(groups, layout, kernel=None):
    """What vLLM makes of KV groups: its configuration, and layers with their caches, full of random numbers.

    kernel: tokens per block of an attention backend that cuts vLLM's.
    """
    config = SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
    )
    page = groups[0].kv_cache_spec.page_size_bytes
    memory = BLOCKS * page * max(len(group.layer_names) for group in groups)
    made = get_kv_cache_config_from_groups(config, groups, memory)
    assert made.num_blocks == BLOCKS
    caches = allocate_kv_cache(made, torch.device("cpu"), layout, kernel and [kernel] * len(groups))
    for cache in caches.values():
        cache.normal_()
    return made, {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()}


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("order", [BY_LAYER, BY_LOOP])
def test_every_loop_is_found_in_any_layout(layout, order):
    """In whatever order vLLM lists the layers."""
    config, layers = laid_out([KVCacheGroupSpec(order, WavefrontSpec(**SIZES))], layout)
    pool = Pool.of(config, NAMES, layers)
    table = torch.stack([torch.randperm(BLOCKS) for _ in range(2)]).to(torch.int32)
    ids = pool.ids([table] * LOOPS)
    assert ids.shape == (LOOPS, 2, BLOCKS)
    for loop, names in enumerate(NAMES):
        for name, cache in zip(names, pool.caches, strict=True):
            own = layers[name].kv_cache
            assert torch.equal(cache[ids[loop].long()], own[table.long()])
            cache[ids[loop, 0, 0]] = loop  # it is the same memory
            assert (own[table[0, 0]] == loop).all()


def test_groups_of_their_own_lie_over_one_another():
    specs = [LoopSpec(loop=loop, window=64, **SIZES) for loop in range(1, LOOPS)] + [SharedSpec(**SIZES)]
    groups = [KVCacheGroupSpec(names, spec) for names, spec in zip(NAMES, specs, strict=True)]
    config, layers = laid_out(groups[::-1], KVCacheLayout.LBHNC)
    pool = Pool.of(config, NAMES, layers)
    assert pool.groups == [3, 2, 1, 0]
    tables = [torch.randint(BLOCKS, (2, 5), dtype=torch.int32) for _ in NAMES]
    assert torch.equal(pool.ids(tables), torch.stack(tables))
    for names in NAMES:
        for name, cache in zip(names, pool.caches, strict=True):
            assert torch.equal(cache, layers[name].kv_cache)


def test_caches_at_other_distances_are_refused():
    config, layers = laid_out([KVCacheGroupSpec(BY_LOOP, FullAttentionSpec(**SIZES))], KVCacheLayout.LBHNC)
    layers[NAMES[2][1]].kv_cache = layers[NAMES[2][2]].kv_cache
    with pytest.raises(RuntimeError, match=f"{NAMES[0][1]} and {NAMES[2][1]} .*regular distance.*Start without"):
        Pool.of(config, NAMES, layers)


def test_caches_of_another_kind_are_refused():
    """As of layers that are left out of an FP8 cache: strides are the same."""
    config, layers = laid_out([KVCacheGroupSpec(BY_LOOP, FullAttentionSpec(**SIZES))], KVCacheLayout.LBHNC)
    for name in NAMES[1]:
        layers[name].kv_cache = layers[name].kv_cache.view(torch.int32)
    with pytest.raises(RuntimeError, match="not alike.*without --kv-cache-dtype-skip-layers"):
        Pool.of(config, NAMES[:2], layers)


def test_blocks_that_attention_cuts_are_refused():
    """Tables name vLLM's blocks; attention would look for the pieces of another loop's."""
    config, layers = laid_out([KVCacheGroupSpec(BY_LAYER, WavefrontSpec(**SIZES))], KVCacheLayout.LBHNC, kernel=16)
    with pytest.raises(ValueError, match="--block-size 32.*16 tokens.*Start with --block-size 16"):
        Pool.of(config, NAMES, layers)


def test_loops_that_lost_their_groups_are_refused():
    """Caches that are the same bytes need tables that differ, and the other way round."""
    config, layers = laid_out([KVCacheGroupSpec(BY_LAYER, WavefrontSpec(**SIZES))], KVCacheLayout.LBHNC)
    for same in zip(*NAMES, strict=True):
        for name in same:
            layers[name].kv_cache = layers[same[0]].kv_cache
    with pytest.raises(RuntimeError, match="regular distance"):
        Pool.of(config, NAMES, layers)
