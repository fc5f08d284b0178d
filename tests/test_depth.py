"""Depth per request through vLLM: fixed depths and the exit gate, against the tests' own forward and pick, in float32.

Servers run up to 6 loops of a checkpoint trained with 4, with and without speculation; requests of all depths share
their batches. Blocks are small (32 slots), so that answers cross boundaries.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from reference import Reference, exit_loops, logits_at
from test_exactness import prompts
from test_speculation import ask, assert_idle, drafting, params, runner_of, scheduler_of, serve, tokens_of

LOOPS = 6
TOKENS = 40
THRESHOLDS = (0.2, 0.5, 0.8, 0.95, 1.0)
WISHES = [
    *({"ouro_loops": loops} for loops in range(1, LOOPS + 1)),
    *({"ouro_exit_threshold": q} for q in THRESHOLDS),
    *({"ouro_loops": 4, "ouro_exit_threshold": q} for q in THRESHOLDS),
    {"ouro_exit_threshold": 0.2, "ouro_min_loops": 3},
    {"ouro_loops": 4, "ouro_exit_threshold": 0.5, "ouro_min_loops": 2},
    {"ouro_speculate": 0, "ouro_exit_threshold": 0.5},
    {"ouro_speculate": 0, "ouro_loops": 2},
    {},
]


@contextmanager
def tallied(llm):
    """The engine with `tallies`: `ouro_depth` of each request since the last look, in the order of their arrival."""
    scheduler, seen = scheduler_of(llm), []
    add = scheduler.add_request

    def noted(request):
        add(request)
        seen.append(request)

    scheduler.add_request = noted
    llm.seen = seen
    yield llm


@pytest.fixture(scope="module")
def plain(engine):
    options = {"block_size": 32, "max_num_seqs": 24}
    with engine(additional_config={"ouro": {"max_loops": LOOPS}}, **options) as llm, tallied(llm):
        yield llm


@pytest.fixture(scope="module")
def swift(engine):
    with drafting(engine, ouro={"max_loops": LOOPS, "entry_loop": 0}, max_num_seqs=24) as llm, tallied(llm):
        yield llm


@pytest.fixture(params=["plain", "swift"])
def both(request):
    return request.getfixturevalue(request.param)


def wished(wish, **given):
    return params(max_tokens=given.pop("max_tokens", TOKENS), extra_args=wish, **given)


def loops_of(reference: Reference, ids: list[int], answer: list[int], wish: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a prompt and its answer: logits [T, V] that each answered token is read from, and after which loop, [T]."""
    depths = reference.run(ids + answer[:-1], wish.get("ouro_loops", LOOPS))
    at = exit_loops(depths, wish.get("ouro_exit_threshold", 1.0), wish.get("ouro_min_loops", 1))
    return logits_at(depths, at)[len(ids) - 1 :], at[len(ids) - 1 :]


def assert_read(reference, asked, answers, wishes) -> list[list[int]]:
    """The answers are the reference's. Returns the loops that their tokens were read after."""
    found = []
    for ids, answer, wish in zip(asked, answers, wishes, strict=True):
        logits, at = loops_of(reference, ids, answer, wish)
        wanted = logits.argmax(-1).tolist()
        assert answer == wanted, f"{wish}, prompt of {len(ids)} tokens: {answer} instead of {wanted}"
        found.append(at.tolist())
    return found


def greedy(llm, asked, wishes, **given):
    llm.seen.clear()
    return [answers[0] for answers in tokens_of(ask(llm, asked, [wished(wish, **given) for wish in wishes]))]


def test_all_depths_in_one_batch(both, reference, heldout):
    """And what is said of each request's depth is what the reference finds."""
    asked = prompts(heldout, [(7, 1, 33, 64, 130)[number % 5] for number in range(len(WISHES))], seed=1)
    read = assert_read(reference, asked, greedy(both, asked, WISHES), WISHES)
    for request, loops in zip(both.seen, read, strict=True):
        tally = request.ouro_depth
        assert (tally.tokens, tally.loops, tally.mean) == (TOKENS, sum(loops), sum(loops) / TOKENS)
    gated = Counter(loop for loops, wish in zip(read, WISHES, strict=True) if len(wish) > 0 for loop in loops)
    assert min(gated[loop] for loop in range(1, LOOPS + 1)) > TOKENS / 2  # there was something to choose


@pytest.mark.parametrize("wish", [WISHES[0], WISHES[2], WISHES[7], WISHES[13]], ids=str)
def test_one_at_a_time(both, reference, heldout, wish):
    asked = prompts(heldout, [20, 97], seed=2)
    assert_read(reference, asked, [greedy(both, [ids], [wish])[0] for ids in asked], [wish] * 2)


def test_requests_that_come_and_go(swift, reference, heldout):
    """Arrivals while others decode, answers of all lengths, one in four aborted: rows that still run leave nothing."""
    asked = prompts(heldout, [5 + 9 * (number % 8) for number in range(60)], seed=3)
    wishes = [WISHES[(7 * number) % len(WISHES)] for number in range(60)]
    arrivals = [
        (number // 2, ids, wished(wish, max_tokens=1 + (11 * number) % 50))
        for number, (ids, wish) in enumerate(zip(asked, wishes, strict=True))
    ]
    answers = serve(swift, arrivals, watch=lambda step: [index for index in range(0, 60, 4) if index // 2 + 3 == step])
    kept = [number for number, answer in enumerate(answers) if answer]
    assert len(kept) > 45
    assert_read(reference, *([values[number] for number in kept] for values in (asked, answers, wishes)))
    assert_idle(swift)


def test_depth_costs_what_it_should(plain, heldout):
    """A batch of one fixed depth d runs d passes per step; plainly gated ones run all loops."""
    model, loops = runner_of(plain).get_model(), []
    one_pass = model.one_pass
    model.one_pass = lambda positions, hidden, loop: loops.append(loop) or one_pass(positions, hidden, loop)
    try:
        asked = prompts(heldout, [12, 30], seed=4)
        for depth in (1, 3, 6):
            loops.clear()
            greedy(plain, asked, [{"ouro_loops": depth}] * 2, max_tokens=5)
            assert loops == 5 * list(range(1, depth + 1))
        loops.clear()
        greedy(plain, asked, [{"ouro_exit_threshold": 0.2}, {"ouro_loops": 2}], max_tokens=5)
        assert loops == 5 * list(range(1, LOOPS + 1))
    finally:
        del model.one_pass


def test_early_exits_save_passes_under_speculation(swift, heldout):
    """A token that the gate lets go after loop t is committed after t passes at most; its other loops cost no pass."""
    waves, ids = runner_of(swift)._waves, prompts(heldout, [24], seed=5)
    spent = {}
    for speculate in (1, 0):
        wish = {"ouro_exit_threshold": 0.2, "ouro_speculate": speculate}
        before, passes = waves._run, []
        waves._run = lambda *args: passes.append(1) or before(*args)  # noqa: B023
        try:
            greedy(swift, ids, [wish], max_tokens=100)
        finally:
            del waves._run
        spent[speculate] = len(passes)
    mean = swift.seen[-1].ouro_depth.mean
    assert mean < 3
    assert spent[1] <= spent[0] <= 100 * mean + LOOPS


# The prefix cache.


def cached(llm, ids, wish, **given):
    """Tokens of the answer, and how many of the prompt's came from the cache."""
    from vllm import TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=ids, **given)
    output = llm.generate([prompt], wished(wish, max_tokens=8), use_tqdm=False)[0]
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_requests_of_another_depth_share_no_blocks(both, reference, heldout):
    """Neither do shallow ones find what deep ones wrote nor the other way round; the same depth does."""
    (ids,) = prompts(heldout, [300], seed=6)
    for turn in (0, 288):  # 300 tokens are 9 blocks and a bit
        for loops in (2, 6, 1, 4):
            wish = {"ouro_loops": loops}
            answer, found = cached(both, ids, wish)
            assert found == turn
            assert_read(reference, [ids], [answer], [wish])


def test_a_users_salt_still_sets_apart(both, heldout):
    (ids,) = prompts(heldout, [100], seed=7)
    found = [cached(both, ids, {"ouro_loops": 3}, cache_salt=salt)[1] for salt in ("a", "b", "a", "ouro:3:a")]
    assert found == [0, 0, 96, 0]


def test_the_gate_writes_what_full_depth_writes(both, reference, heldout):
    """Gate after full depth and full depth after the gate, also on what the gate generated: hits, and right answers."""
    (ids,) = prompts(heldout, [200], seed=8)
    full, early = {}, {"ouro_exit_threshold": 0.2}
    assert cached(both, ids, full)[1] == 0
    answer, found = cached(both, ids, early)
    assert found == 192
    assert_read(reference, [ids], [answer], [early])

    (other,) = prompts(heldout, [70], seed=9)
    text = other + greedy(both, [other], [early], max_tokens=150)[0]
    for wish in (full, early):
        answer, found = cached(both, text, wish)
        assert found >= 160  # most of the generated text, too
        assert_read(reference, [text], [answer], [wish])


# Under speculation.


def test_seeded_draws_are_those_without_speculation(plain, swift, heldout):
    asked = prompts(heldout, [3 + 17 * number for number in range(len(WISHES))], seed=10)
    wishes = [
        wished(wish, temperature=(0.7, 1.0)[number % 2], seed=number, top_p=(1.0, 0.9, 0.8)[number % 3])
        for number, wish in enumerate(WISHES)
    ]
    drafted = swift.drafts.accepted
    assert tokens_of(ask(swift, asked, wishes)) == tokens_of(ask(plain, asked, wishes))
    assert swift.drafts.accepted - drafted > TOKENS * len(WISHES) / 4


def test_a_failed_pass_loses_no_loop(swift, reference, heldout, monkeypatch):
    """Rows that were committed early and then lost are computed again before anything reads what they left out."""
    machine, number = runner_of(swift)._waves.machine, 0
    run = machine.run

    def failing(*args):
        nonlocal number
        number += 1
        if number % 13 == 0:
            raise RuntimeError("thrown in by the test")
        return run(*args)

    monkeypatch.setattr(machine, "run", failing)
    wishes = [{"ouro_exit_threshold": 0.2}, {"ouro_exit_threshold": 0.5}, {"ouro_loops": 2}, {}]
    asked = prompts(heldout, [9, 40, 64, 3], seed=11)
    assert_read(reference, asked, greedy(swift, asked, wishes), wishes)
    assert number > 40


def test_depths_under_textbook_speculation(engine, reference, heldout):
    ouro = {"max_loops": LOOPS, "speculation": "draft-verify"}
    asked = prompts(heldout, [6 + 11 * number for number in range(len(WISHES))], seed=12)
    with drafting(engine, passes=3, ouro=ouro, max_num_seqs=24) as llm, tallied(llm):
        assert_read(reference, asked, greedy(llm, asked, WISHES), WISHES)
        assert llm.drafts.accepted > TOKENS


# What a server says of itself, and what it refuses.


def test_a_servers_own_depth(engine, reference, heldout):
    """It holds for requests that say nothing; of those that do, for what they leave out."""
    ouro = {"loops": 3, "exit_threshold": 0.5}
    asked, other = prompts(heldout, [40, 41], seed=13), {"ouro_loops": 2}
    with engine(block_size=32, additional_config={"ouro": ouro}) as llm, tallied(llm):
        answers = greedy(llm, asked, [{}, other])
    assert_read(reference, asked, answers, [{"ouro_loops": 3, "ouro_exit_threshold": 0.5}, other])


WRONG = [{"ouro_loops": 7}, {"ouro_exit_threshold": 0}, {"ouro_loops": 2, "ouro_min_loops": 2}]


@pytest.mark.parametrize("wish", WRONG)
def test_wrong_depths_are_refused(plain, wish):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="vllm_xargs: `ouro_"):
        ask(plain, [[5, 6, 7]], wished(wish))
