"""The answers are the model's own: the plugin through vLLM against tests/reference.py, whatever way the work is cut.

Float32. Logits of every prompt position through the public API (`prompt_logprobs` with `logprobs_mode="raw_logits"`);
greedy outputs compared token by token: the reference reads prompt and answer in one go, and each answered token must be
the argmax of what it sees before it.
"""

import hashlib
import json
import random

import pytest
import torch
from conftest import CHECKPOINT
from reference import Reference

torch.manual_seed(0)
LENGTHS = [1, 2, 3, 31, 32, 33, 127, 128, 129, 255, 256, 257, 383, 512, 640, 699, 700]
ANSWER = 64
TOLERANCE = 1e-3


def prompts(heldout: list[int], lengths: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    starts = [rng.randrange(len(heldout) - n) for n in lengths]
    return [heldout[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def mixed_lengths(count: int, longest: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, longest) for _ in range(count)]


def greedy(llm, asked: list[list[int]], tokens: int = ANSWER) -> list[list[int]]:
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_greedy(
    reference: Reference, asked: list[list[int]], answers: list[list[int]], loops: int | None = None
) -> None:
    for ids, answer in zip(asked, answers, strict=True):
        logits = reference.run(ids + answer[:-1], loops)[-1].logits[len(ids) - 1 :]
        wanted = logits.argmax(-1).tolist()
        assert answer == wanted, f"prompt of {len(ids)} tokens: {answer} instead of {wanted}"


def prompt_logits(llm, ids: list[int], vocabulary: int) -> torch.Tensor:
    """Logits [T, V]: all prompt positions and, from the one generated token, the last."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False
    )
    output = llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)[0]
    rows = []
    for flat in (output.prompt_logprobs, output.outputs[0].logprobs):
        tokens, values = torch.tensor(flat.token_ids).view(-1, vocabulary + 1), torch.tensor(flat.logprobs)
        # Each position lists its own token first and then the whole vocabulary.
        rows.append(torch.full((len(tokens), vocabulary), torch.nan).scatter_(1, tokens, values.view(tokens.shape)))
    return torch.cat(rows)


def assert_logits(
    llm, reference: Reference, ids: list[int], loops: int | None = None, within: float = TOLERANCE
) -> None:
    got = prompt_logits(llm, ids, reference.config["vocab_size"])
    wanted = reference.run(ids, loops)[-1].logits
    difference = (got - wanted).abs().max(-1).values
    worst = int(difference.nan_to_num(torch.inf).argmax())
    assert difference[worst] <= within, f"{len(ids)} tokens, position {worst}: off by {difference[worst]}"


@pytest.fixture(scope="module")
def plain(engine):
    """All loops, prefix caching on, prompts in chunks of up to 2,048 tokens."""
    with engine(logprobs_mode="raw_logits", max_logprobs=-1) as llm:
        yield llm


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_at_every_position(plain, reference, heldout, length):
    assert_logits(plain, reference, prompts(heldout, [length], seed=length)[0])


def test_greedy_answers_of_a_mixed_batch(plain, reference, heldout):
    asked = prompts(heldout, mixed_lengths(60, longest=200, seed=1), seed=2)
    assert_greedy(reference, asked, greedy(plain, asked))


def test_greedy_answers_one_at_a_time(plain, reference, heldout):
    asked = prompts(heldout, [1, 5, 130, 300], seed=3)
    assert_greedy(reference, asked, [greedy(plain, [ids])[0] for ids in asked])


def test_prefix_cache_hits_change_nothing(plain, reference, heldout):
    """Second turn of the same prompt, and prompts that share its first 512 tokens: cached blocks are really used."""
    from vllm import SamplingParams, TokensPrompt

    first = prompts(heldout, [700], seed=4)[0]
    asked = [first, first, first[:512] + prompts(heldout, [77], seed=5)[0], first[:600]]
    greedy(plain, asked[:1])
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    outputs = plain.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], params, use_tqdm=False)
    assert all(output.num_cached_tokens >= 512 for output in outputs)
    assert_greedy(reference, asked, [list(output.outputs[0].token_ids) for output in outputs])


def test_gate_gives_the_references_exit_distribution(plain, reference, heldout):
    """The served model's gate on the hidden states of every depth, and the distribution that follows from it."""
    from reference import Depth, exit_distribution

    depths = reference.run(prompts(heldout, [300], seed=6)[0])
    states = [depth.hidden for depth in depths]
    gates = plain.apply_model(lambda model: [model.exit_logits(state) for state in states])[0]
    for gate, depth in zip(gates, depths, strict=True):
        assert torch.allclose(gate, depth.exit_logit, atol=1e-4)
    served = [Depth(depth.hidden, depth.logits, gate) for depth, gate in zip(depths, gates, strict=True)]
    distribution = exit_distribution(served)
    assert torch.allclose(distribution, exit_distribution(depths), atol=1e-4)
    assert torch.allclose(distribution.sum(0), torch.ones(300), atol=1e-5)


@pytest.mark.parametrize("loops", [1, 2, 3, 6])
def test_other_depths(engine, reference, heldout, loops):
    """`max_loops` below and above the checkpoint's own four; in chunks of an odd size all the same."""
    options = {"additional_config": {"ouro": {"max_loops": loops}}, "max_num_batched_tokens": 211, "max_num_seqs": 16}
    asked = prompts(heldout, mixed_lengths(12, longest=300, seed=7), seed=8)
    with engine(logprobs_mode="raw_logits", max_logprobs=-1, **options) as llm:
        assert_logits(llm, reference, prompts(heldout, [333], seed=9)[0], loops)
        assert_greedy(reference, asked, greedy(llm, asked), loops)


@pytest.mark.parametrize("chunk", [17, 101])
def test_chunked_prefill_in_odd_sizes(engine, reference, heldout, chunk):
    asked = prompts(heldout, [1, 16, 17, 18, 100, 200, 333, 700], seed=10)
    with engine(max_num_batched_tokens=chunk, max_num_seqs=5, enable_prefix_caching=False) as llm:
        assert_greedy(reference, asked, greedy(llm, asked))


def test_preemption_and_recomputation(engine, reference, heldout):
    """Eight requests in a KV cache that holds about half of them: some are thrown out and computed again."""
    asked = prompts(heldout, mixed_lengths(8, longest=100, seed=11), seed=12)
    options = {"block_size": 32, "num_gpu_blocks_override": 24, "max_model_len": 512, "disable_log_stats": False}
    with engine(**options) as llm:
        answers = greedy(llm, asked, tokens=120)
        counts = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert sum(counts) > 0
    assert_greedy(reference, asked, answers)


def test_bfloat16_is_off_by_bfloat16s_own_error(engine, reference, heldout):
    """As far from float32 as bfloat16 is expected to be: each loop's rounding adds up, a wrong loop is far outside."""
    ids = prompts(heldout, [400], seed=13)[0]
    wanted = reference.run(ids)
    with engine(dtype="bfloat16", logprobs_mode="raw_logits", max_logprobs=-1) as llm:
        got = prompt_logits(llm, ids, reference.config["vocab_size"])
    scale = wanted[-1].logits.std()
    error = (got - wanted[-1].logits).pow(2).mean().sqrt() / scale
    other_loop = (wanted[-2].logits - wanted[-1].logits).pow(2).mean().sqrt() / scale
    assert error < 0.05
    assert error < other_loop / 2


def test_tensor_parallel_on_two_workers(engine, reference, heldout, monkeypatch):
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed for two workers")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    asked = prompts(heldout, mixed_lengths(8, longest=300, seed=14), seed=15)
    with engine(tensor_parallel_size=2) as llm:
        assert_greedy(reference, asked, greedy(llm, asked))


def test_one_pass_is_compiled_once(engine, reference, heldout, monkeypatch, tmp_path):
    """vLLM's compilation on, nothing cached: one graph, with as many attention calls as layers, serves all loops."""
    from torch._inductor import compile_fx

    graphs, compile_graph = {}, compile_fx.compile_fx

    def counted(graph, *args, **kwargs):  # it calls itself with the same graph, hence a dictionary
        graphs[graph] = sum("unified_attention_with_output" in str(node.target) for node in graph.graph.nodes)
        return compile_graph(graph, *args, **kwargs)

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(compile_fx, "compile_fx", counted)
    asked = prompts(heldout, mixed_lengths(12, 300, seed=16), seed=17)
    with engine(enforce_eager=False) as llm:
        assert_greedy(reference, asked, greedy(llm, asked))
    assert list(graphs.values()) == [reference.config["num_hidden_layers"]]


def test_the_reference_notices_a_wrong_loop(reference, heldout):
    """The yardstick itself: one loop fewer gives other tokens, so the comparisons above cannot pass by luck."""
    ids = prompts(heldout, [200], seed=18)[0]
    three, four = (reference.run(ids, loops)[-1].logits.argmax(-1) for loops in (3, 4))
    assert not torch.equal(three, four)


def test_the_card_speaks_of_the_bundled_weights_and_misses_nothing():
    weights = (CHECKPOINT / "model.safetensors").read_bytes()
    card = json.loads((CHECKPOINT / "evaluation.json").read_text())
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(card["requirements"]) == 8 and all(check["met"] for check in card["requirements"])
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6
