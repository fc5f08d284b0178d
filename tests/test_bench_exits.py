"""Quality by depth: the forward, the ways of leaving and the figures of `ouro-vllm bench --exit`, without an engine."""

import json
import random

import pytest
import torch
from checkpoints import write
from conftest import CHECKPOINT
from hypothesis import given
from hypothesis import strategies as st
from reference import Depth, Reference, exit_loops

from ouro_vllm.bench.exits import curve
from ouro_vllm.bench.exits.policies import (
    FIXED,
    GATE,
    STILL,
    STRIDE,
    SURE,
    WINDOW,
    Scores,
    between,
    chosen,
    quality,
    score_rows,
    score_sums,
    score_text,
    settings,
    windows,
)
from ouro_vllm.bench.results import save
from ouro_vllm.cli import build_parser, main
from ouro_vllm.evaluation import data
from ouro_vllm.evaluation.forward import Looped
from ouro_vllm.evaluation.policies import EvalError


@pytest.fixture(scope="module")
def forward():
    return Looped(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer():
    return data.tokenizer(CHECKPOINT)


def test_the_forward_is_the_references(forward, reference, heldout):
    """Batched, at every loop, the gate too."""
    asked = [heldout[100:177], heldout[5000:5077]]
    states = forward.read(torch.tensor(asked))
    for row, ids in enumerate(asked):
        for state, depth in zip(states, reference.run(ids), strict=True):
            assert torch.allclose(state[row], depth.hidden, atol=1e-4)
            assert torch.allclose(forward.logits(state[row]), depth.logits, atol=1e-3)
            assert torch.allclose(forward.gate(state[row]), depth.exit_logit, atol=1e-4)


def test_the_forward_knows_grouped_heads_and_tied_embeddings(tmp_path):
    folder = write(tmp_path, num_key_value_heads=2, tie_word_embeddings=True)
    ids = [5, 9, 100, 7, 7, 3]
    (*_, state), (*_, depth) = Looped(folder).read(torch.tensor([ids])), Reference(folder).run(ids)
    assert torch.allclose(state[0], depth.hidden, atol=1e-4)
    assert torch.allclose(Looped(folder).logits(state[0]), depth.logits, atol=1e-3)


def test_other_rotary_embeddings_are_refused(tmp_path):
    folder = write(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="'linear'"):
        Looped(folder)


@given(st.integers(1, 3 * WINDOW))
def test_windows_score_every_place_once_behind_enough_context(count):
    scored = []
    for done, start, stop in windows(count):
        assert stop - start <= WINDOW
        assert start == 0 or done - start >= STRIDE
        scored += range(done, stop)
    assert scored == list(range(count))


def test_text_is_scored_as_the_reference_scores_it(forward, reference, heldout):
    """Longer than a window: the first tokens by the whole text, the last by their own window."""
    ids = heldout[: WINDOW + 100]
    scores = score_text(forward, ids)
    assert scores.loss.shape == (4, len(ids) - 1)
    for start, part in ((0, slice(0, WINDOW)), (99, slice(WINDOW, WINDOW + 99))):
        depths = reference.run(ids[start:-1] if start else ids[:WINDOW])
        for loop, depth in enumerate(depths):
            logits = depth.logits[part.start - start : part.stop - start]
            targets = torch.tensor(ids[part.start + 1 : part.stop + 1])
            wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            assert torch.allclose(scores.loss[loop, part], wanted, atol=1e-3)
            assert torch.equal(scores.right[loop, part], (logits.argmax(-1) == targets).float())
            assert torch.allclose(scores.top[loop, part], logits.softmax(-1).max(-1).values, atol=1e-4)


def random_scores(loops: int, tokens: int, seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    loss, top, change = (torch.rand(loops, tokens, generator=draw) for _ in range(3))
    right = (torch.rand(loops, tokens, generator=draw) < 0.5).float()
    return Scores(loss, right, top, torch.randn(loops, tokens, generator=draw), change)


@pytest.mark.parametrize("seed", range(5))
def test_rows_leave_where_the_definitions_say(seed):
    dice = random.Random(seed)
    loops = dice.randint(1, 6)
    scores = random_scores(loops, 57, seed)
    depths = [Depth(None, None, gate) for gate in scores.gate]
    for q in (0.2, 0.5, 0.95):
        assert torch.equal(chosen(scores, GATE, q) + 1, exit_loops(depths, q))
    for policy, table, leaves in (
        (SURE, scores.top, lambda value: value >= 0.7),
        (STILL, scores.change, lambda value: value <= 0.3),
    ):
        wanted = [next((t for t in range(loops) if leaves(table[t, n])), loops - 1) for n in range(57)]
        assert chosen(scores, policy, 0.7 if policy == SURE else 0.3).tolist() == wanted
    assert chosen(scores, FIXED, loops).tolist() == [loops - 1] * 57


def test_changes_are_shares_of_the_norm_before(forward):
    states = [torch.randn(9, forward.config.hidden_size) for _ in range(3)]
    scores = score_rows(forward, states, torch.arange(9))
    assert scores.change[0].isinf().all()
    for loop in (1, 2):
        for row in range(9):
            moved = torch.dist(states[loop][row], states[loop - 1][row]) / states[loop - 1][row].norm()
            assert scores.change[loop, row] == pytest.approx(float(moved), rel=1e-5)


def test_quality_of_fixed_depths_is_their_own_baseline():
    text, some = random_scores(4, 50, 1), {1: random_scores(4, 20, 2), 3: random_scores(4, 30, 3)}
    for depth in range(1, 5):
        found = quality(text, some, FIXED, depth)
        assert found["mean_depth"] == found["sums"]["mean_depth"] == depth
        assert found["loss"] == pytest.approx(found["loss_of_fixed"]) == float(text.loss[depth - 1].mean())
        assert found["sums"]["accuracy"] == {str(n): float(one.right[depth - 1].mean()) for n, one in some.items()}
        assert found["sums"]["mean_accuracy"] == pytest.approx(found["sums"]["mean_accuracy_of_fixed"])
        assert found["shares"] == [float(loop == depth) for loop in range(1, 5)]


def test_between():
    assert [between([4.0, 2.0, 1.0], depth) for depth in (1, 1.5, 2, 2.25, 3)] == [4.0, 3.0, 2.0, 1.75, 1.0]
    assert between([4.0], 1.0) == 4.0


def test_sums_are_right_fresh_for_each_size_and_the_same_every_time(tokenizer):
    def value(tokens: list[str]) -> int:
        head = tokens.pop(0)
        if head.isdigit():
            return int(head)
        a, b = value(tokens), value(tokens)
        return {"+": a + b, "-": a - b, "*": a * b}[head]

    for operators in range(1, data.corpus().LARGEST_TREE + 1):
        found = data.sums(tokenizer, operators, 20, "sums")
        assert found == data.sums(tokenizer, operators, 20, "sums") != data.sums(tokenizer, operators, 20)
        for one in found:
            line = tokenizer.decode(one.ids).rpartition("\n")[2]
            assert tokenizer.decode(one.ids[: one.prompt]).endswith("\n") and "\n" not in line
            assert sum(map(line.count, "+-*")) == operators
            assert int(tokenizer.decode([one.answer])) == value(line.removesuffix(" =").split()) % 5
    answers = [one.answer for one in found]
    assert data.commonest(found) == max(map(answers.count, answers)) / 20


def test_padding_does_not_show_in_the_answers_to_sums(forward, tokenizer, reference):
    found = data.sums(tokenizer, 4, 40)
    scores = score_sums(forward, found)
    for row in (0, 31, 32, 39):
        depths = reference.run(found[row].ids)
        said = [float(depth.logits[-1].argmax() == found[row].answer) for depth in depths]
        assert scores.right[:, row].tolist() == said


def test_held_out_text(tokenizer, tmp_path):
    from corpus import library

    names = {document.text: document.held_out for document in library()}
    ids = data.stream(tokenizer, None, 2048, 3000)
    first = tokenizer.decode(ids[1 : ids.index(ids[0], 1)], skip_special_tokens=False)
    assert len(ids) == 3000 and names[first]
    file = tmp_path / "text"
    file.write_text("def f(x):\n    return x\n")
    assert tokenizer.decode(data.stream(tokenizer, file, 2048)) == file.read_text()
    assert len(data.stream(tokenizer, file, 2048, 5)) == 5
    for wrong, vocabulary, named in ((tmp_path / "none", 2048, "cannot be read"), (file, 9, "beyond `vocab_size` 9")):
        with pytest.raises(EvalError, match=named):
            data.stream(tokenizer, wrong, vocabulary)


# What is reported.


def figures() -> dict:
    text, some = random_scores(4, 200, 1), {n: random_scores(4, 50, n) for n in (1, 2)}
    found = [quality(text, some, *setting) for setting in settings(text, [0.3, 0.6])]
    for one in found:
        if one["policy"] in (FIXED, GATE):
            speed = {"rates": [10.0, 12.0], "median": 11.0, "mean_depth": one["mean_depth"]}
            one["speed"] = {"plain": dict(speed), "wavefront": {**speed, "median": 31.5}}
    return {
        "model": "some-model",
        "loops": 4,
        "text_tokens": 200,
        "sums": 50,
        "chance": {"1": 0.2, "2": 0.25},
        "policies": found,
        **{"device": "cpu", "threads": 2, "vllm": "0.32.0", "dtype": "float32", "batch": 1, "tokens": 8, "rounds": 2},
    }


def test_the_report_has_a_line_for_every_setting_and_says_who_wins(tmp_path):
    made = figures()
    save(made, tmp_path / "exit.json")
    assert json.loads((tmp_path / "exit.json").read_text()) == made
    page = curve.text(made)
    for one in made["policies"]:
        (line,) = (line for line in curve.for_readme(made).splitlines() if line.startswith(f"| {curve.named(one)} |"))
        assert f"{one['mean_depth']:.2f}" in line and f"{one['loss']:.3f}" in line
        assert ("31.5" in line) == (one["policy"] in (FIXED, GATE))
    for one in made["policies"]:
        one["loss_of_fixed"] = one["loss"] + (0.1 if one["setting"] == 0.3 else -0.1)
        one["sums"]["mean_accuracy_of_fixed"] = one["sums"]["mean_accuracy"] - 0.1
    assert "below that of fixed depths at 1 of 2 thresholds, its accuracy on sums above theirs at 2." in curve.text(
        made
    )
    assert "chance" in page


def test_an_earlier_run_is_reported_anew(tmp_path, capsys):
    saved, readme = tmp_path / "exit.json", tmp_path / "README.md"
    save(figures(), saved)
    readme.write_text("<!-- bench-exit -->\n<!-- /bench-exit -->\n")
    assert main(["bench", "--exit", "--from", str(saved), "--readme", str(readme)]) == 0
    assert curve.text(figures()) in capsys.readouterr().out and curve.for_readme(figures()) in readme.read_text()


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    curve.draw(figures(), tmp_path / "exit.png")
    assert (tmp_path / "exit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", ["0", "1", "x", "", "0.5,2"])
def test_thresholds_that_are_none(wrong, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "--exit", "--thresholds", wrong])
    assert "above 0 and below 1" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said_before_anything_starts(tmp_path, capsys):
    folder = write(tmp_path / "model")
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["text"]')
    assert main(["bench", "--exit", "--model", str(folder), "--prompts", str(prompts)]) == 1
    assert "holds no tokenizer.json" in capsys.readouterr().err
    (tmp_path / "empty").write_text("")
    assert main(["bench", "--exit", "--text", str(tmp_path / "empty")]) == 1
    assert "fewer than 2 tokens" in capsys.readouterr().err
    assert main(["bench", "--exit", "--from", str(prompts)]) == 1
    assert "These are not figures" in capsys.readouterr().err
    assert main(["bench", "--exit", "--starts", "2"]) == 1
    assert "leave out --starts" in capsys.readouterr().err
