"""Ways of choosing the loop that a token is read after, and what they do to quality.

Besides fixed depths and the exit gate, which are served, two plain rivals that are only measured: leaving at the first
loop whose most likely token has a given probability, and at the first that changes the hidden state by little.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_vllm.evaluation.data import Sum
from ouro_vllm.evaluation.forward import Looped

FIXED, GATE, SURE, STILL = "fixed", "gate", "top-1", "change"
POLICIES = {
    FIXED: "every token after the same loop",
    GATE: "the model's exit gate, at threshold q",
    SURE: "the first loop whose most likely token has at least this probability",
    STILL: "the first loop that changes the hidden state by at most this share of its norm",
}
CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of all changes: the thresholds of STILL are these quantiles
WINDOW, STRIDE = 512, 256
ROWS = 2048  # read out at once


@dataclass(frozen=True)
class Scores:
    """N tokens, each predicted after each of R loops. All are [R, N].

    loss: nats. right: the most likely token was the token, 1 or 0. top: its probability. gate: logits. change: of the
    hidden state against the loop before, as a share of that one's norm; infinite after the first.
    """

    loss: Tensor
    right: Tensor
    top: Tensor
    gate: Tensor
    change: Tensor


def score_rows(forward: Looped, states: list[Tensor], targets: Tensor) -> Scores:
    """states: R of [n, D], what predicts targets [n]."""
    columns: dict[str, list[Tensor]] = {"loss": [], "right": [], "top": [], "gate": [], "change": []}
    for loop, state in enumerate(states):
        parts = []
        for rows, wanted in zip(state.split(ROWS), targets.split(ROWS), strict=True):
            logits = forward.logits(rows).log_softmax(-1)
            best, token = logits.max(-1)
            parts.append((F.nll_loss(logits, wanted, reduction="none"), (token == wanted).float(), best.exp()))
        for name, values in zip(("loss", "right", "top"), zip(*parts, strict=True), strict=True):
            columns[name].append(torch.cat(values))
        columns["gate"].append(forward.gate(state))
        before = states[loop - 1]
        moved = (state - before).norm(dim=-1) / before.norm(dim=-1)
        columns["change"].append(moved if loop else torch.full_like(moved, torch.inf))
    return Scores(**{name: torch.stack(values) for name, values in columns.items()})


def score_text(forward: Looped, ids: list[int]) -> Scores:
    """All tokens but the first, read in windows: each predicted once, with STRIDE tokens or more before it, if any."""
    stream, found = torch.tensor(ids), []
    for done, start, stop in windows(len(ids) - 1):
        states = [state[0, done - start :] for state in forward.read(stream[None, start:stop])]
        found.append(score_rows(forward, states, stream[done + 1 : stop + 1]))
    return joined(found)


def windows(count: int) -> Iterator[tuple[int, int, int]]:
    """Cut 0..count-1 into (first scored, first read, end), scoring every place once."""
    done = 0
    while done < count:
        stop = min(count, done + (WINDOW if done == 0 else STRIDE))
        yield done, max(0, stop - WINDOW), stop
        done = stop


def score_sums(forward: Looped, sums: list[Sum]) -> Scores:
    """The answers to expressions of one size."""
    last = torch.tensor([len(one.ids) - 1 for one in sums])
    # What is padded on the right is in the future of the position that is read.
    ids = torch.tensor([one.ids + [0] * (int(last.max()) + 1 - len(one.ids)) for one in sums])
    answers, found = torch.tensor([one.answer for one in sums]), []
    for some in torch.arange(len(ids)).split(32):
        states = [state[torch.arange(len(some)), last[some]] for state in forward.read(ids[some])]
        found.append(score_rows(forward, states, answers[some]))
    return joined(found)


def joined(scores: list[Scores]) -> Scores:
    """Of all tokens of several."""
    return Scores(**{name: torch.cat([getattr(one, name) for one in scores], 1) for name in Scores.__annotations__})


def chosen(scores: Scores, policy: str, setting: float) -> Tensor:
    """The loop, from 0, that each token is read after: [N]. setting: see POLICIES; of FIXED the depth, from 1."""
    if policy == FIXED:
        return torch.full((scores.loss.shape[1],), int(setting) - 1)
    if policy == GATE:
        reached = 1 - (1 - scores.gate.double().sigmoid()).cumprod(0) >= setting
    elif policy == SURE:
        reached = scores.top >= setting
    else:
        reached = scores.change <= setting
    reached[-1] = True
    return reached.int().argmax(0)


def settings(text: Scores, thresholds: list[float]) -> list[tuple[str, float]]:
    """All that is measured: (policy, setting)."""
    loops, changes = len(text.loss), text.change[1:].flatten()
    # torch.quantile takes no more than 2 ** 24 numbers.
    sorted_changes = changes.sort().values
    still = [float(sorted_changes[int(share * (len(sorted_changes) - 1))]) for share in SHARES] if loops > 1 else []
    return [
        *((FIXED, loop) for loop in range(1, loops + 1)),
        *((GATE, q) for q in thresholds),
        *((SURE, confidence) for confidence in CONFIDENCES),
        *((STILL, share) for share in still),
    ]


def quality(text: Scores, sums: dict[int, Scores], policy: str, setting: float) -> dict[str, Any]:
    """What one setting does: depth and loss on the text, depth and accuracy on sums by operators.

    `..._of_fixed`: what fixed depths, mixed at random, do at the same mean depth: interpolated between whole ones.
    """
    loops = chosen(text, policy, setting)
    depth = float(loops.double().mean()) + 1
    rows, depths, mixed = {}, [], []
    for operators, scores in sums.items():
        at = chosen(scores, policy, setting)
        rows[str(operators)] = float(scores.right.gather(0, at[None]).mean())
        depths.append(float(at.double().mean()) + 1)
        mixed.append(between(scores.right.mean(1).tolist(), depths[-1]))
    return {
        "policy": policy,
        "setting": setting,
        "mean_depth": depth,
        "shares": (loops.bincount(minlength=len(text.loss)) / len(loops)).tolist(),
        "loss": float(text.loss.gather(0, loops[None]).double().mean()),
        "loss_of_fixed": between(text.loss.double().mean(1).tolist(), depth),
        "sums": {
            "mean_depth": sum(depths) / len(depths),
            "accuracy": rows,
            "mean_accuracy": sum(rows.values()) / len(rows),
            "mean_accuracy_of_fixed": sum(mixed) / len(mixed),
        },
    }


def between(values: list[float], depth: float) -> float:
    """values: at depths 1, 2, ...; the value on the straight line between the two around `depth`."""
    below = min(int(depth), len(values) - 1)
    if below == 0:  # one depth only
        return values[0]
    return values[below - 1] + (depth - below) * (values[below] - values[below - 1])
