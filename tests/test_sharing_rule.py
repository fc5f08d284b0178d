"""The rule of what a row reads under sharing, the options for it, and the blocks that are freed: without an engine."""

import random
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ouro_vllm.kv import (
    LoopManager,
    LoopSpec,
    SharedManager,
    SharedSpec,
    WavefrontManager,
    WavefrontSpec,
    decoding_capacity,
    fold,
)
from ouro_vllm.options import OptionError, OuroOptions
from ouro_vllm.sharing import LAST, Sharing

RULES = st.builds(Sharing, st.just(LAST), st.integers(1, 70), st.sampled_from([1, 4, 16, 32]))


@given(RULES, st.integers(0, 300), st.integers(1, 150))
def test_a_window_is_never_smaller_than_asked_for_and_less_than_a_block_larger(rule, position, prompt):
    start = rule.start(position, prompt)
    if position < prompt:
        assert start == 0
    else:
        assert start % rule.block == 0
        assert start <= max(0, position - rule.window + 1) < start + rule.block


@given(RULES, st.integers(0, 300), st.integers(1, 200), st.integers(1, 150))
def test_runs_read_as_shared_only_what_lies_before_them(rule, first, length, prompt):
    runs = list(rule.runs(first, first + length, prompt))
    assert [position for begin, end in runs for position in range(begin, end)] == list(range(first, first + length))
    for number, (begin, end) in enumerate(runs):
        assert all(rule.start(position, prompt) <= begin for position in range(begin, end))
        # Neither shorter than need be: the next position could not have come along.
        assert number == 0 or end == first + length or rule.start(end, prompt) > begin


@given(RULES, st.integers(0, 300), st.integers(1, 200), st.integers(1, 150))
def test_pieces_have_one_window_start_each(rule, first, length, prompt):
    pieces = list(rule.pieces(first, first + length, prompt))
    assert [position for begin, end in pieces for position in range(begin, end)] == list(range(first, first + length))
    for begin, end in pieces:
        assert len({rule.start(position, prompt) for position in range(begin, end)}) == 1


def test_fold_is_the_mean_of_whole_blocks():
    """Blocks not named keep what they hold; what was in the destination, NaN here, does not matter."""
    cache = torch.randn(9, 3, 5, 7)
    cache[[4, 8]] = torch.nan
    before, own = cache.clone(), torch.tensor([[1, 3, 5], [2, 3, 0]])
    fold(cache, own, torch.tensor([4, 8]))
    assert torch.allclose(cache[4], (before[1] + before[3] + before[5]) / 3)
    assert torch.allclose(cache[8], (before[2] + before[3] + before[0]) / 3)
    rest = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(cache[rest], before[rest])


# Options.


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv_sharing": "first"}, '`ouro.kv_sharing` is \'first\'.*"per_loop" or "last" or "average"'),
        ({"kv_sharing": 1}, "`ouro.kv_sharing` is 1"),
        ({"kv_sharing": "last", "max_loops": 1}, "one loop has nothing to share.*max_loops"),
        ({"kv_sharing": "last", "kv_window": 2}, "`ouro.kv_window` is 2.*from 3 on"),
        ({"kv_sharing": "last", "kv_window": 4, "max_loops": 6}, "`ouro.kv_window` is 4.*from 5 on"),
        ({"kv_sharing": "last", "kv_window": True}, "`ouro.kv_window` is True"),
        ({"kv_sharing": "last", "kv_window": "64"}, "`ouro.kv_window` is '64'"),
    ],
)
def test_options_that_make_no_sense(given, named):
    with pytest.raises(OptionError, match=f"(?s){named}"):
        OuroOptions.parse({"ouro": given}, 4)


def test_the_defaults_are_exact():
    options = OuroOptions.parse({}, 4)
    assert options.kv_sharing == "per_loop" and not options.shares


# What managers hold and publish.

BLOCK = 32
SIZES = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 16, "dtype": torch.float32}


class Blocks:
    """A pool of blocks, and managers of R groups over it, as vLLM's coordinator makes them; without a window of the one
    group of a server whose loops share nothing."""

    def __init__(self, window: int | None, blocks: int = 4000) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.pool = BlockPool(blocks, enable_caching=True, hash_block_size=BLOCK)
        specs, kinds = [WavefrontSpec(**SIZES)], [WavefrontManager]
        if window is not None:
            specs = [LoopSpec(loop=loop, window=window, **SIZES) for loop in (1, 2, 3)] + [SharedSpec(**SIZES)]
            kinds = [LoopManager] * 3 + [SharedManager]
        self.loops = 4 // len(specs)  # in one block
        self.managers = [
            kind(spec, self.pool, enable_caching=True, kv_cache_group_id=number, scheduler_block_size=BLOCK)
            for number, (kind, spec) in enumerate(zip(kinds, specs, strict=True))
        ]

    def decode(self, request: str, prompt: int, tokens: int, ahead: int) -> None:
        """Slots for the token behind `tokens`, as `KVCacheManager.allocate_slots` asks for them."""
        for manager in self.managers:
            manager.remove_skipped_blocks(request, tokens, prompt)
            manager.allocate_new_blocks(request, tokens + 1 + ahead, tokens + 1)

    def held(self) -> int:
        """In blocks of one loop."""
        return self.loops * (self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())


@pytest.mark.parametrize("window", [3, 31, 32, 33, 128, 256])
def test_what_is_read_is_held_and_little_else(window):
    """Through a long answer: every block some row reads is there, and what is held stays within the stated bound."""
    prompt, ahead, pool = random.Random(window).randint(1, 200), 11, Blocks(window)
    rule = Sharing(LAST, window, BLOCK)
    for manager in pool.managers:
        manager.allocate_new_blocks("a", prompt + ahead, prompt)
    for tokens in range(prompt, 1500):
        pool.decode("a", prompt, tokens, ahead)
        needed = rule.start(tokens, prompt) // BLOCK
        for manager in pool.managers[:3]:
            blocks = manager.req_to_blocks["a"]
            assert all(not block.is_null for block in blocks[needed:])
            assert all(block.is_null for block in blocks[:needed])
        assert not any(block.is_null for block in pool.managers[3].req_to_blocks["a"])
        whole = -(-(tokens + 1 + ahead) // BLOCK)
        assert pool.held() <= whole + 3 * (-(-(window + ahead) // BLOCK) + 2)


@pytest.mark.parametrize("window", [128, 256])
def test_a_quarter_of_the_memory_at_8192_tokens(window):
    held = {}
    for size in (None, window):
        pool = Blocks(size)
        for manager in pool.managers:
            manager.allocate_new_blocks("a", 32, 32)
        for tokens in range(32, 8192, 16):
            pool.decode("a", 32, tokens, ahead=0)
        held[size] = pool.held()
    assert held[window] <= 0.28 * held[None]


def test_the_log_line_reckons_with_what_is_held():
    """So many requests of that length really fit, and not one more."""
    context, window, ahead, blocks = 1000, 64, 11, 500
    fit = decoding_capacity(blocks, BLOCK, context, window, ahead, windowed=3) // context
    pool = Blocks(window, blocks + 1)
    for number in range(fit):
        for manager in pool.managers:
            manager.allocate_new_blocks(f"{number}", 32, 32)
        for tokens in range(32, context - ahead):
            pool.decode(f"{number}", 32, tokens, ahead)
    assert pool.pool.get_num_free_blocks() < pool.held() / fit


def test_requests_that_decode_together():
    """Prompts of 256 tokens, answers of 3,840, window 128: at least 3.2 times as many fit as without sharing."""
    prompt, context, most = 256, 4096, {}
    for window in (None, 128):
        pool = Blocks(window)
        for manager in pool.managers:
            manager.allocate_new_blocks("a", prompt, prompt)
        peak = pool.held()
        for tokens in range(prompt, context, 8):
            pool.decode("a", prompt, tokens, ahead=11)
            peak = max(peak, pool.held())
        most[window] = peak
    assert most[None] / most[128] >= 3.2


def test_only_prompts_are_published():
    """Whatever number of tokens vLLM offers."""
    for manager in Blocks(64).managers:
        offered = []
        manager.block_pool = SimpleNamespace(
            cache_full_blocks=lambda offered=offered, **given: offered.append(given["num_full_blocks"]),
            hash_block_size=BLOCK,
        )
        request = SimpleNamespace(request_id="a", num_prompt_tokens=100, shared_prefix_boundary=0)
        for tokens in (40, 100, 500):
            manager.cache_blocks(request, tokens, replay_boundaries=())
        assert offered == [1, 3]


def manager_of(window: int, blocks: int):
    """vLLM's whole KV manager over groups as `Blocks` has them, with events."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    specs = [LoopSpec(loop=loop, window=window, **SIZES) for loop in (1, 2, 3)] + [SharedSpec(**SIZES)]
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    sizes = {"max_model_len": 1000, "scheduler_block_size": BLOCK, "hash_block_size": BLOCK}
    return KVCacheManager(KVCacheConfig(blocks, [], groups), **sizes, enable_kv_cache_events=True)


def request_of(name: str, prompt: list[int]):
    """A request whose generated tokens are hashed too, so that nothing but the managers holds them back."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, SamplingParams(max_tokens=900), None, block_hasher=hasher)


def steps_of(manager, request, generated: int, chunk: int = BLOCK + 7):
    """Schedule a request up to so many generated tokens, and yield after each step."""
    found, cached = manager.get_computed_blocks(request)[:2]
    while request.num_computed_tokens < request.num_prompt_tokens + generated:
        fresh = min(chunk, request.num_tokens - request.num_computed_tokens - cached)
        assert manager.allocate_slots(request, fresh, cached, found) is not None
        request.num_computed_tokens += cached + fresh
        found, cached = None, 0
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(len(request.all_token_ids))
        yield


def test_events_say_what_will_be_found():
    """At every step a reader of the events knows how much of each prompt a new request would find.

    They name blocks of prompts alone, and tell of those that others have taken over. In the second round some blocks
    exist twice, and vLLM tells of a removal when the first of two goes: then a reader may expect too little, never too
    much.
    """
    from vllm.distributed.kv_events import BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    rng, manager, removed, hits = random.Random(5), manager_of(window=40, blocks=61), 0, set()
    prompts = [[rng.randrange(100) for _ in range(length)] for length in (100, 64, 31, 129, 200)]
    known: list[set] = [set() for _ in range(4)]  # hashes by group
    for number, prompt in enumerate(prompts + prompts):
        request, whole = request_of(f"{number}", prompt), len(prompt) // BLOCK * BLOCK
        for _ in steps_of(manager, request, generated=150):
            for event in manager.take_events():
                if isinstance(event, BlockStored):
                    tokens = event.token_ids
                    assert len(tokens) == BLOCK * len(event.block_hashes) > 0
                    assert tokens in [prompt[start : start + len(tokens)] for start in range(0, whole, BLOCK)]
                    known[event.group_idx].update(event.block_hashes)
                else:
                    removed += 1
                    known[event.group_idx].difference_update(event.block_hashes)
            for other in prompts:
                wanted = request_of("new", other)
                hashes = [maybe_convert_block_hash(each) for each in wanted.block_hashes[: (len(other) - 1) // BLOCK]]
                expected = BLOCK * min(sum(takewhile(bool, (each in group for each in hashes))) for group in known)
                found = manager.get_computed_blocks(wanted)[1]
                assert expected == found if number < len(prompts) else expected <= found
                hits.add(found)
            manager.take_events()  # of what those found
        manager.free(request)
    assert removed > 10 and len(hits) > 4


def test_the_usage_falls_when_a_prompt_is_done():
    """It is what the rule says is held, at every step."""
    prompt, manager, used = 256, manager_of(window=64, blocks=201), []
    request, rule = request_of("a", list(range(prompt))), Sharing(LAST, 64, BLOCK)
    for _ in steps_of(manager, request, generated=300):
        computed = request.num_computed_tokens
        first = rule.start(computed - 1, prompt) // BLOCK  # what the newest token reads of its own loop
        held = 4 * -(-computed // BLOCK) - 3 * first
        assert manager.usage == pytest.approx(held / 200)
        used.append(held)
    manager.free(request)
    assert manager.usage == 0
    assert used[prompt // (BLOCK + 7)] == max(used) == 4 * prompt // BLOCK
    assert used[-1] < max(used) and request.num_tokens > 2 * prompt


def test_a_request_that_comes_back_is_let_in_by_what_it_can_hold():
    manager = Blocks(64).managers[0]
    manager.requests, manager.most_tokens = {"a": SimpleNamespace(num_prompt_tokens=100)}, 256
    asked = {"new_computed_blocks": [], "total_computed_tokens": 0, "num_local_computed_tokens": 0}
    whole = manager.get_num_blocks_to_allocate("a", 6400, num_tokens_main_model=6400, **asked)
    capped = manager.get_num_blocks_to_allocate(
        "a", 6400, num_tokens_main_model=6400, apply_admission_cap=True, **asked
    )
    assert whole == 200 and capped == -(-(100 + 64 + 256 + BLOCK) // BLOCK)
