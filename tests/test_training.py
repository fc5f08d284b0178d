"""The training script on a model in miniature: the right function, the right losses, and runs that can be killed."""

import argparse
import random

import pytest
import torch
from corpus import LARGEST_TREE, MODULUS, Document, expression, library, sum_chat, sum_line, train_tokenizer
from model import LoopedLM, Shape, exit_distribution
from reference import Reference
from reference import exit_distribution as reference_distribution
from safetensors.torch import load_file
from train import Batches, Run, export, loop_weights, rate, stage_two_loss

SHAPE = Shape(vocab_size=400, hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2)
STEPS = argparse.Namespace(steps=4, settle_steps=2, gate_steps=2, lr=0.02, save_every=1, eager=True)


@pytest.fixture(scope="module")
def batches():
    words = [f"def f{n}(x):\n    '''Give back {n} times x.'''\n    return {n} * x\n\n" for n in range(300)]
    documents = [Document(f"module{n}", "".join(words[n::10])) for n in range(10)]
    return Batches(train_tokenizer(documents, SHAPE.vocab_size, seed=1), documents, seed=1)


def value(tokens: list[str]) -> int:
    """Evaluate prefix notation, reading the list from its front."""
    token = tokens.pop(0)
    if token.isdigit():
        return int(token)
    left, right = value(tokens), value(tokens)
    return (left + right if token == "+" else left - right if token == "-" else left * right) % MODULUS


@pytest.mark.parametrize("operators", range(1, LARGEST_TREE + 1))
def test_sums_are_right(operators):
    dice = random.Random(operators)
    for _ in range(50):
        text, answer = expression(dice, operators)
        tokens = text.split()
        assert sum(token in "+-*" for token in tokens) == operators
        assert value(tokens) == answer and not tokens
    state = dice.getstate()
    line = sum_line(dice, operators)
    dice.setstate(state)
    assert sum_chat(dice, operators).split("assistant\n")[1][0] == line.strip()[-1]


def test_no_held_out_module_is_trained_on():
    documents = library()
    held = {document.source for document in documents if document.held_out}
    assert held and not held & {document.source for document in documents if not document.held_out}


def test_only_answers_weigh_in_sums(batches):
    ids, targets, weights = batches.batch(3, 0.9, 256)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    tokens = [batches.tokenizer.id_to_token(int(i)) for i in targets[1][weights[1] > 1]]
    assert len(tokens) > 5
    assert {token.removeprefix("Ġ") for token in tokens} <= set("01234")
    assert (weights[-1] == 1).all()


def test_a_batch_depends_on_seed_and_step_alone(batches):
    again, other = batches.batch(7, 0.5, 256), batches.batch(8, 0.5, 256)
    assert all(torch.equal(a, b) for a, b in zip(batches.batch(7, 0.5, 256), again, strict=True))
    assert not torch.equal(again[0], other[0])


def test_the_trained_function_is_the_references(tmp_path, batches):
    torch.manual_seed(2)
    net = LoopedLM(SHAPE)
    for p in net.parameters():
        p.data = (p.data + 0.1 * torch.randn_like(p)).bfloat16().float()
    export(net, batches.tokenizer, tmp_path)
    ids = torch.randint(SHAPE.vocab_size, (1, 50))
    depths = Reference(tmp_path).run(ids[0].tolist())
    with torch.inference_mode():
        states = net(ids)
        assert len(states) == len(depths)
        for state, depth in zip(states, depths, strict=True):
            assert (net.readout(state)[0] - depth.logits).abs().max() < 1e-3
        gates = torch.stack([net.gate(state)[0] for state in states])
        assert (exit_distribution(gates) - reference_distribution(depths)).abs().max() < 1e-4


def test_a_killed_run_ends_as_one_that_was_not(tmp_path, batches, monkeypatch):
    whole = Run(tmp_path / "whole", 5, SHAPE, STEPS.lr)
    whole.train(batches, STEPS)
    save, left = Run.save, iter(range(3))

    def killed(self: Run) -> None:
        save(self)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "killed", 5, SHAPE, STEPS.lr).train(batches, STEPS)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="'seed': 5.*--work"):
        Run(tmp_path / "killed", 99, SHAPE, STEPS.lr)
    resumed = Run(tmp_path / "killed", 5, SHAPE, STEPS.lr)
    assert resumed.step == 4
    resumed.train(batches, STEPS)
    for run, folder in ((whole, "a"), (resumed, "b")):
        export(run.net, batches.tokenizer, tmp_path / folder)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stage_two_moves_the_gate_alone(tmp_path, batches):
    run = Run(tmp_path, 6, SHAPE, STEPS.lr)
    run.train(batches, argparse.Namespace(**{**vars(STEPS), "gate_steps": 0}))
    before = {name: p.detach().clone() for name, p in run.net.named_parameters()}
    run.train(batches, STEPS)
    moved = {name for name, p in run.net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}


def test_the_gate_learns_to_stay_where_a_loop_pays():
    """One more loop pays for the first token and not for the second: the loss asks for small and large lambdas."""
    losses = torch.tensor([[[2.0, 1.0]], [[1.0, 1.0]]])
    gates = torch.zeros(2, 1, 2, requires_grad=True)
    stage_two_loss(losses, gates, torch.ones(1, 2)).backward()
    pays, wasted = gates.grad[0, 0]
    assert pays > 0 > wasted  # descent lowers the exit logit of the first and raises that of the second
    assert (gates.grad[1] == 0).all()


@pytest.mark.parametrize("progress", [0.0, 0.29, 0.3, 0.64, 0.65, 0.99, 1.0, 1.2])
def test_weights_of_the_loops_add_up_to_one(progress):
    weights = loop_weights(torch.full((4, 2, 3), 0.25), progress)
    assert torch.allclose(weights.sum(0), torch.ones(()), atol=1e-6)
    assert (weights > 0).all() and (weights[-1] >= weights[:-1].max(0).values).all()


def test_learning_rate_starts_low_and_ends_near_nothing_twice():
    rates = [rate(step, 1000, 100) for step in range(1100)]
    assert rates[0] < 0.05 and max(rates) == 1.0
    assert rates[999] < 0.01 and rates[1000] == pytest.approx(0.15) and 0 < rates[1099] < 0.01
