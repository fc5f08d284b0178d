"""Sampled answers under self-speculation have plain decoding's distribution. Float32, the trained checkpoint.

With equal seeds whole answers are equal (test_speculation.py); here seeds differ between the two, so that only the
distribution can agree. Compared are the frequencies of the second token and of the second bigram: the first of each
comes from a prompt's readout, the others from drafts that vLLM's rejection sampler judged.
"""

import random
from collections import Counter

import pytest
import torch
from conftest import CHECKPOINT, running

SPECULATION = {
    "speculative_config": {"method": "custom_class", "model": "ouro_vllm.SelfSpeculator", "num_speculative_tokens": 8},
    "additional_config": {"ouro": {"entry_loop": 1}},  # or a machine that is busy computing would draft nothing
}
SEEDS, PLACES = 500, 64
SIGNIFICANCE = 1e-3  # per comparison: a dozen of them raise a false alarm in one run of eighty
# A fifth of the mass on the wrong tokens, or three tenths on the wrong bigrams, is found at least this often.
SHIFT, POWER = {"tokens": 0.2, "bigrams": 0.3}, 0.95
SETTINGS = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top-p": {"temperature": 0.7, "top_p": 0.9},
    "temperature 1, top-p": {"temperature": 1.0, "top_p": 0.8},
    "temperature 0.7, top-k": {"temperature": 0.7, "top_k": 6},
    "temperature 1, top-k": {"temperature": 1.0, "top_k": 6},
}


def p_value(left: Counter, right: Counter) -> float:
    """Chi-square test of homogeneity; what is expected fewer than 5 times in either sample is taken together."""
    n, m = left.total(), right.total()
    table, rest = [], [0, 0]
    for value in left.keys() | right.keys():
        pair = [left[value], right[value]]
        if sum(pair) * min(n, m) / (n + m) >= 5:
            table.append(pair)
        else:
            rest = [rest[0] + pair[0], rest[1] + pair[1]]
    if sum(rest) * min(n, m) / (n + m) >= 5:
        table.append(rest)
    observed = torch.tensor(table, dtype=torch.float64)
    expected = observed.sum(1, keepdim=True) * observed.sum(0) / observed.sum()
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(table) - 1) / 2, dtype=torch.float64), statistic / 2))


def counted(llm, prompt: list[int], seeds: range, **params) -> tuple[Counter, Counter]:
    """Second tokens, and pairs of second and third, of one answer per seed."""
    from vllm import SamplingParams, TokensPrompt

    asked = [SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False, seed=seed, **params) for seed in seeds]
    answers = []
    for first in range(0, len(asked), PLACES):  # all of a batch begin together: their second tokens are drafted
        some = asked[first : first + PLACES]
        outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt)] * len(some), some, use_tqdm=False)
        answers += [output.outputs[0].token_ids for output in outputs]
    return Counter(a[1] for a in answers), Counter((a[1], a[2]) for a in answers)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """A line of arithmetic: what follows is one of a few signs and digits, so that frequencies can be told apart."""
    from corpus import sum_line
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return tokenizer.encode(sum_line(random.Random(3), 3)).ids


@pytest.fixture(scope="module")
def plain(prompt) -> dict[str, tuple[Counter, Counter]]:
    with running(max_num_seqs=PLACES) as llm:
        return {name: counted(llm, prompt, range(SEEDS), **params) for name, params in SETTINGS.items()}


@pytest.fixture(scope="module")
def speculative():
    with running(max_num_seqs=PLACES, **SPECULATION) as llm:
        yield llm


@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_are_plain_decodings(plain, speculative, prompt, setting):
    core = speculative.llm_engine.engine_core.engine_core
    before = core.scheduler.steps
    here = counted(speculative, prompt, range(SEEDS, 2 * SEEDS), **SETTINGS[setting])
    # A step per token would be 16 for each filling of the batch: the answers were drafted.
    assert core.scheduler.steps - before < 10 * SEEDS / PLACES, "nothing was drafted"
    for left, right in zip(plain[setting], here, strict=True):
        assert p_value(left, right) > SIGNIFICANCE


def test_a_wrong_draft_distribution_is_found(plain, speculative, prompt, monkeypatch):
    """The same comparison fails where the sampler is told other probabilities than the drafts were drawn from."""
    runner = speculative.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    honest = type(runner)._get_spec_decode_draft_probs

    def sharpened(self, metadata):
        probabilities = honest(self, metadata)
        return None if probabilities is None else probabilities**4 / (probabilities**4).sum(-1, keepdim=True)

    monkeypatch.setattr(type(runner), "_get_spec_decode_draft_probs", sharpened)
    here = counted(speculative, prompt, range(2 * SEEDS, 3 * SEEDS), **SETTINGS["temperature 1"])
    assert min(p_value(a, b) for a, b in zip(plain["temperature 1"], here, strict=True)) < SIGNIFICANCE


@pytest.mark.parametrize("of", SHIFT)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_power_that_is_stated(plain, setting, of):
    """Draws from the observed frequencies against draws with SHIFT of the mass moved to the least frequent half."""
    rng = random.Random(1)
    ranked, shift = plain[setting][list(SHIFT).index(of)].most_common(), SHIFT[of]
    values, weights = [value for value, _ in ranked], [count / SEEDS for _, count in ranked]
    half = len(values) // 2
    moved = [w * (1 - shift) for w in weights]
    moved = [w + (shift / (len(values) - half) if i >= half else 0) for i, w in enumerate(moved)]
    found = sum(
        p_value(Counter(rng.choices(values, weights, k=SEEDS)), Counter(rng.choices(values, moved, k=SEEDS)))
        < SIGNIFICANCE
        for _ in range(60)
    )
    assert found / 60 >= POWER
