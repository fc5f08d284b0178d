"""What passes read and write, without an engine: steps that carry on what the step before laid out."""

import random
from dataclasses import replace

import pytest
import torch

from ouro_vllm.sharing import LAST, Sharing
from ouro_vllm.wavefront.tensors import Passes, Step
from ouro_vllm.wavefront.waves import Chunk

LOOPS, BLOCK, WIDTH, HIDDEN = 4, 32, 12, 8


class Machine:
    """Passes over a model that only notes what it is told."""

    def __init__(self, sharing):
        self.seen = []
        self.passes = Passes(
            slots=1,
            hidden_size=HIDDEN,
            block_size=BLOCK,
            dtype=torch.float32,
            device=torch.device("cpu"),
            embed=lambda ids: torch.full((len(ids), HIDDEN), torch.nan),
            model=self.note,
            choose=None,
            loops=LOOPS,
            sharing=sharing,
        )

    def note(self, positions, hidden, common):
        self.seen.append(common)
        return hidden

    def run(self, step, starts):
        """All loops of a step of one token per request; returns what the passes were told, and leaves the step."""
        chunks = [Chunk(lane, start, 1, lane, LOOPS) for lane, start in enumerate(starts)]
        self.passes.step = replace(step, chunk_ids=torch.zeros(len(starts), dtype=torch.int64))
        self.seen = []
        for loop in range(1, LOOPS + 1):
            self.passes.run([], [], chunks, loop)
        return self.seen, self.passes.step


def assert_same(told, wanted):
    for name in vars(wanted):
        one, other = getattr(told, name), getattr(wanted, name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), name
        else:
            assert one == other, name


@pytest.mark.parametrize("window", [None, 3, 32, 50])
@pytest.mark.parametrize("seed", range(5))
def test_a_step_carried_on_is_the_step_laid_out_anew(window, seed):
    """Whenever it is carried on at all; and it is, but where a block or a window begins."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    sharing = None if window is None else Sharing(LAST, window, BLOCK)
    prompts = [dice.randint(1, 100) for _ in range(3)]
    starts = [prompt + dice.randint(0, 60) for prompt in prompts]
    tables = torch.randint(100, (LOOPS, len(prompts), WIDTH), dtype=torch.int32)
    carrying, anew = Machine(sharing), Machine(sharing)
    carried, step = 0, None
    for _ in range(150):
        fresh = Step(tables, prompts)
        onward = None if step is None else carrying.passes.onward(step)
        begun = any(start % BLOCK == 0 for start in starts) or any(
            sharing and sharing.start(start, prompt) != sharing.start(start - 1, prompt)
            for start, prompt in zip(starts, prompts, strict=True)
        )
        if step is not None:
            assert (onward is None) == begun
        carried += onward is not None
        told, step = carrying.run(onward or fresh, starts)
        wanted, _ = anew.run(fresh, starts)
        assert len(told) == LOOPS
        for one, other in zip(told, wanted, strict=True):
            assert_same(one, other)
        starts = [start + 1 for start in starts]
    assert carried > 100


def test_steps_that_are_not_carried_on():
    """Of several tokens per request, or of rows in flight."""
    machine = Machine(None)
    step = Step(torch.zeros(LOOPS, 1, WIDTH, dtype=torch.int32))
    assert machine.passes.onward(step) is None
    machine.passes.step = replace(step, chunk_ids=torch.zeros(2, dtype=torch.int64))
    machine.passes.run([], [], [Chunk(0, 3, 2, 0, LOOPS)], 1)
    assert machine.passes.onward(machine.passes.step) is None
