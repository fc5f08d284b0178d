"""Sharing keys and values across loops, through vLLM: the same answers however the work is cut, and the reference's.

Float32, greedy. Windows and blocks are small, so that nearly all an answer reads of its past is shared.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from checkpoints import write
from conftest import CHECKPOINT
from sharing_reference import SharedReference
from test_anytime import streams
from test_exactness import TOLERANCE, greedy, prompts
from test_speculation import (
    EAGER,
    SPECULATOR,
    assert_idle,
    drafting,
    params,
    plain_now_and_then,
    preempted,
    runner_of,
    scheduler_of,
    serve,
    tokens_of,
)

from ouro_vllm.sharing import LAST, Sharing

POLICIES = ["last", "average"]
WINDOW, BLOCK, TOKENS = 20, 32, 128
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 100, 129, 200, 300]


def sharing(policy, window=WINDOW, **more):
    return {"ouro": {"kv_sharing": policy, "kv_window": window, **more}}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request):
    return request.param


@pytest.fixture(scope="module")
def bank(engine, heldout, policy):
    """(prompt, answer) of an engine that shares, without speculation, all in one batch."""
    asked = prompts(heldout, LENGTHS, seed=31)
    with engine(additional_config=sharing(policy), block_size=BLOCK, enable_prefix_caching=False) as llm:
        return list(zip(asked, greedy(llm, asked, TOKENS), strict=True))


def assert_banked(llm, bank, tokens=TOKENS):
    assert greedy(llm, [ids for ids, _ in bank], tokens) == [answer[:tokens] for _, answer in bank]


def speculating(engine, policy, window=WINDOW, **options):
    return drafting(engine, ouro={**sharing(policy, window)["ouro"], **EAGER}, **options)


def test_logits_are_the_references(engine, heldout, policy):
    """Raw logits of every generated token, from the whole vocabulary."""
    from vllm import SamplingParams, TokensPrompt

    reference = SharedReference(CHECKPOINT, policy, WINDOW, BLOCK)
    exact = SharedReference(CHECKPOINT, "per_loop", WINDOW, BLOCK)
    vocabulary = reference.config["vocab_size"]
    params = SamplingParams(
        temperature=0, max_tokens=50, ignore_eos=True, logprobs=-1, flat_logprobs=True, detokenize=False
    )
    with engine(
        additional_config=sharing(policy), block_size=BLOCK, logprobs_mode="raw_logits", max_logprobs=-1
    ) as llm:
        asked = prompts(heldout, [40, 70], seed=32)
        for ids in asked:
            output = llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)[0].outputs[0]
            flat = output.logprobs
            tokens, values = torch.tensor(flat.token_ids).view(-1, vocabulary + 1), torch.tensor(flat.logprobs)
            got = torch.full((len(tokens), vocabulary), torch.nan).scatter_(1, tokens, values.view(tokens.shape))
            whole = ids + list(output.token_ids)[:-1]
            wanted = reference.logits(whole, len(ids))[len(ids) - 1 :]
            assert (got - wanted).abs().max() <= TOLERANCE
            assert wanted.argmax(-1).tolist() == list(output.token_ids)
            # Sharing does show: this test would not pass with loops that read their own.
            assert (got - exact.logits(whole, len(ids))[len(ids) - 1 :]).abs().max() > 100 * TOLERANCE
        steps_carried_on(llm, asked)


def steps_carried_on(llm, asked):
    """Steps go on with what the one before laid out, until somebody comes or goes; answers are those of each alone."""
    wishes = [params(max_tokens=40), params(max_tokens=10)]
    alone = [answer for ids, wish in zip(asked, wishes, strict=True) for answer in serve(llm, [(0, ids, wish)])]
    runner, carried = runner_of(llm), []
    onward = runner._onward
    runner._onward = lambda chunks: carried.append(onward(chunks)) or carried[-1]
    assert serve(llm, [(0, asked[0], wishes[0]), (10, asked[1], wishes[1])]) == alone
    begun = [step for step, made in enumerate(carried) if made is None]
    assert len(carried) == 40 and {0, 10, 20} <= set(begun)  # the second one has its tokens in steps 10 to 19
    assert len(begun) < 12


def test_speculation_batched_and_alone(engine, bank, policy):
    with speculating(engine, policy) as llm:
        assert_banked(llm, bank)
        assert llm.drafts.accepted > 0.3 * TOKENS * len(bank)
        for pair in bank[::4]:
            assert_banked(llm, [pair])
        # A second time, from the prefix cache.
        assert_banked(llm, bank)
        assert_idle(llm)


def test_chunked_prompts_and_preemption(engine, bank, policy, monkeypatch):
    """A cache for about half of the requests, and prompts cut into chunks of odd sizes beside decoding.

    What is published as cached meanwhile are the prompts' whole blocks, of every group, and nothing else.
    """
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import BlockStored

    with speculating(
        engine,
        policy,
        max_num_batched_tokens=61,
        max_num_seqs=13,
        num_gpu_blocks_override=84,
        max_model_len=480,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    ) as llm:
        lost, events = preempted(llm), []
        monkeypatch.setattr(scheduler_of(llm).kv_event_publisher, "publish", lambda batch: events.extend(batch.events))
        assert_banked(llm, bank[:9])
        assert_banked(llm, bank[9:])
        assert_idle(llm)
        assert max(lost, default=0) > 2 * WINDOW
        lost.clear()
        answers = streams(llm, [ids for ids, _ in bank[:9]], TOKENS, drafts=False)
        assert [answer.token_ids for answer in answers] == [answer for _, answer in bank[:9]]
        assert_idle(llm)
        assert any(lost) and any(answer.retracted for answer in answers)
        lost.clear()
        steps = plain_now_and_then(llm, monkeypatch, seed=4)
        assert_banked(llm, bank[:9])
        assert_idle(llm)
    assert max(lost, default=0) > WINDOW and steps.count(True) > 1
    stored = [event for event in events if isinstance(event, BlockStored)]
    blocks = {
        (event.group_idx, *event.token_ids[at : at + BLOCK])
        for event in stored
        for at in range(0, len(event.token_ids), BLOCK)
    }
    assert blocks == {
        (group, *ids[at : at + BLOCK])
        for group in range(4 if policy == LAST else 5)
        for ids, _ in bank
        for at in range(0, len(ids) - BLOCK + 1, BLOCK)
    }
    assert len(stored) < len(events)  # others were told to be gone


def test_preemption_without_speculation(engine, bank, policy):
    with engine(
        additional_config=sharing(policy),
        block_size=BLOCK,
        max_num_batched_tokens=77,
        max_num_seqs=13,
        num_gpu_blocks_override=110,
        max_model_len=480,
    ) as llm:
        lost = preempted(llm)
        assert_banked(llm, bank)
    assert max(lost, default=0) > 2 * WINDOW


@pytest.mark.parametrize("window", [3, 33])
def test_other_windows(engine, heldout, policy, window):
    """The smallest that is served, three rows under way, and one just above a block."""
    asked = prompts(heldout, [40, 77], seed=33)
    reference = SharedReference(CHECKPOINT, policy, window, BLOCK)
    with speculating(engine, policy, window) as llm:
        for ids, answer in zip(asked, greedy(llm, asked, 40), strict=True):
            wanted = reference.logits(ids + answer[:-1], len(ids))[len(ids) - 1 :].argmax(-1).tolist()
            assert answer == wanted


def test_conversations(engine, heldout, policy):
    """Turns that begin with earlier prompts and answers: the same with and without prefix caching, and really cached.

    The second turn's prompt holds what the first turn generated, with the keys and values of a prompt. Then the first
    turn again, beside it: its own answer's blocks must not be taken from the second's prompt.
    """
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True, detokenize=False)
    said, hits = [], []
    for caching in (False, True):
        with speculating(engine, policy, enable_prefix_caching=caching) as llm:
            talk, answers, cached = prompts(heldout, [130], seed=34)[0], [], []
            for turn in range(3):
                (output,) = llm.generate([TokensPrompt(prompt_token_ids=talk)], params, use_tqdm=False)
                ((answer,),) = tokens_of([output])
                answers.append(answer)
                cached.append(output.num_cached_tokens)
                talk = talk + answer + prompts(heldout, [17], seed=35 + turn)[0]
            said.append(answers)
            hits.append(cached)
            first = prompts(heldout, [130], seed=34)[0]
            assert greedy(llm, [talk, first], 70)[1] == answers[0]
    assert said[0] == said[1]
    assert hits[0] == [0, 0, 0] and hits[1][1] >= 128 and hits[1][2] > hits[1][1]


def test_draft_verify(engine, bank, policy):
    with drafting(
        engine, passes=3, ouro={**sharing(policy)["ouro"], "speculation": "draft-verify"}, max_num_seqs=8
    ) as llm:
        assert_banked(llm, bank[:6], 60)


def test_tensor_parallel(engine, bank, policy, monkeypatch):
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed for two workers")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    config = {"ouro": {**sharing(policy)["ouro"], **EAGER}}
    speculative = {**SPECULATOR, "num_speculative_tokens": 8}
    with engine(
        additional_config=config, speculative_config=speculative, block_size=BLOCK, tensor_parallel_size=2
    ) as llm:
        assert_banked(llm, bank[:6], 64)


# How many requests decode together.


@dataclass(frozen=True)
class Load:
    """Requests with prompts of `prompt` tokens that go on to `context` tokens, at a window of `window`."""

    prompt: int
    context: int
    window: int

    def blocks(self, windowed: int) -> int:
        """Most blocks that one of them holds, by the rule; windowed: groups that keep a window only."""
        rule = Sharing(LAST, self.window, BLOCK)
        recent = [at // BLOCK + 1 - rule.start(at, self.prompt) // BLOCK for at in range(self.prompt, self.context - 1)]
        return -(-(self.context - 1) // BLOCK) + windowed * max(recent)

    def fits(self, llm, count: int) -> bool:
        """Whether `count` of them decode to the end together, and none loses its blocks on the way."""
        lost, running, generator = preempted(llm), [], torch.Generator().manual_seed(count)

        def watch(step):
            running.append(len(scheduler_of(llm).running))
            return range(count) if lost else ()

        wish = params(max_tokens=self.context - self.prompt)
        asked = torch.randint(163, (count, self.prompt), generator=generator).tolist()
        answers = serve(llm, [(0, ids, wish) for ids in asked], watch)
        if lost:
            return False
        assert {len(answer) for answer in answers} == {wish.max_tokens}
        assert set(running[:-1]) == {count}  # after the last step they are gone, all at once
        return True


def decoding_together(engine, folder, load: Load, alone: int) -> dict[str, int]:
    """Requests that decode together in a cache of the bytes that `alone` of them fill under `per_loop`, by policy."""
    config = json.loads((folder / "config.json").read_text())
    loops, layers = config["total_ut_steps"], config["num_hidden_layers"]
    page = 2 * BLOCK * config["num_key_value_heads"] * config["head_dim"] * 4
    most = {}
    for policy, blocks in (("per_loop", loops * load.blocks(0)), (LAST, load.blocks(loops - 1))):
        with engine(
            folder,
            skip_tokenizer_init=True,
            additional_config=sharing(policy, load.window),
            block_size=BLOCK,
            kv_cache_memory_bytes=(alone * load.blocks(0) + 1) * loops * layers * page,  # one block is nobody's
            max_model_len=load.context,
            max_num_seqs=256,
        ) as llm:
            most[policy] = (alone * load.blocks(0) * loops + loops - 1) // blocks
            assert load.fits(llm, most[policy])
            assert not load.fits(llm, most[policy] + 1)
    return most


def test_requests_that_decode_together(engine, tmp_path, monkeypatch):
    """As many as the rule says, which is 3.2 times as many as without sharing, and not one more. Weights are random:
    they do not matter here."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")  # it would go before the bytes asked for
    folder = write(
        tmp_path,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        total_ut_steps=4,
        max_position_embeddings=1024,
    )
    most = decoding_together(engine, folder, Load(prompt=256, context=1024, window=32), alone=3)
    assert most[LAST] >= 3.2 * most["per_loop"]
