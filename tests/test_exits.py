"""Where the gate lets rows go, against the definition, one row at a time."""

import math
import random

import pytest
import torch

from ouro_vllm.exits import ExitPick, chance
from ouro_vllm.options import Depth


def one_by_one(depth: Depth, logits: list[float]) -> int:
    """logits: of one row, after each loop. Returns the loop it is read after."""
    staying, cdf = 1.0, 0.0
    for loop in range(1, depth.loops):
        leaving = 1 / (1 + math.exp(-logits[loop - 1]))
        cdf += staying * leaving
        staying *= 1 - leaving
        if depth.threshold < 1 and loop >= depth.least and cdf >= depth.threshold:
            return loop
    return depth.loops


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_read_after_the_loop_the_definition_says(seed):
    """Requests of odd sizes and all kinds of depth in one batch, deepest first, those done left out; NaN as padding."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    most, size, padding = dice.randint(1, 7), dice.choice([1, 3, 17]), dice.randint(0, 5)
    depths = []
    for _ in range(dice.randint(1, 9)):
        loops = dice.randint(1, most)
        depths.append(Depth(loops, dice.choice([0.05, 0.3, 0.7, 0.95, 1.0]), dice.randint(1, loops)))
    depths.sort(key=lambda depth: -depth.loops)
    counts = [dice.choice([1, 2, 7, 33]) for _ in depths]
    rows = sum(counts)
    hidden = torch.randn(most, rows + padding, size, generator=generator)
    hidden[:, rows:] = torch.nan
    logits = 2 * torch.randn(most, rows + padding, generator=generator)
    logits[:, rows:] = torch.nan

    loop = 0
    pick = ExitPick(depths, counts, torch.empty(rows + padding, size), lambda states: logits[loop - 1, : len(states)])
    for loop in range(1, depths[0].loops + 1):
        running = sum(count for depth, count in zip(depths, counts, strict=True) if depth.loops >= loop)
        pick.take(loop, hidden[loop - 1, : running if running < rows else rows + padding])
    row = 0
    for depth, count in zip(depths, counts, strict=True):
        for _ in range(count):
            wanted = one_by_one(depth, logits[:, row].tolist())
            assert pick.loop[row] == wanted
            assert torch.equal(pick.hidden[row], hidden[wanted - 1, row])
            row += 1


def test_the_gate_is_asked_only_where_it_has_a_say():
    def never(_):
        raise AssertionError("asked")

    hidden = torch.randn(3, 5)
    pick = ExitPick([Depth(2), Depth(3, 0.4, 3), Depth(1, 0.2)], [1, 1, 1], hidden, never)
    for loop in (1, 2, 3):
        pick.take(loop, loop * hidden)
    assert pick.loop.tolist() == [2, 3, 1]
    assert torch.equal(pick.hidden, torch.tensor([[2.0], [3.0], [1.0]]) * hidden)


def test_chances_are_the_sigmoid_in_double_precision():
    logits = torch.tensor([-80.0, -1.5, 0.0, 1.5, 80.0])
    assert chance(logits).tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in logits.tolist()], rel=1e-14)
    assert chance(logits.bfloat16()).dtype is torch.float64
