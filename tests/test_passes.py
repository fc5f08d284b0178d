"""What passes read and write, without an engine: steps that carry on what the step before laid out."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from ouro_vllm import runner
from ouro_vllm.runner import LoopPasses
from ouro_vllm.sharing import LAST, Sharing
from ouro_vllm.wavefront.tensors import Passes, Step
from ouro_vllm.wavefront.waves import Chunk

LOOPS, BLOCK, WIDTH, HIDDEN = 4, 32, 12, 8


def passes(sharing, kernels=False):
    return Passes(
        slots=1,
        hidden_size=HIDDEN,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
        embed=None,
        model=None,
        choose=None,
        loops=LOOPS,
        sharing=sharing,
        kernels=kernels,
    )


def told(machine, step, starts):
    """What all loops of a step of one token per request are told, and the step as it is left."""
    machine.step = step
    return machine.lockstep([Chunk(lane, start, 1, lane, LOOPS) for lane, start in enumerate(starts)]), machine.step


def assert_same(given, wanted):
    for name in vars(wanted):
        one, other = getattr(given, name), getattr(wanted, name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), name
        else:
            assert np.array_equal(one, other), name


@pytest.mark.parametrize("window", [None, 3, 32, 50])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_carried_on_is_the_step_laid_out_anew(window, kernels, seed):
    """Whenever it is carried on at all; and it is, but where a block or a window begins."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    sharing = None if window is None else Sharing(LAST, window, BLOCK)
    prompts = [dice.randint(1, 100) for _ in range(3)]
    starts = [prompt + dice.randint(0, 60) for prompt in prompts]
    tables = torch.randint(100, (LOOPS, len(prompts), WIDTH), dtype=torch.int32)
    carrying, anew = passes(sharing, kernels), passes(sharing, kernels)
    carried, step = 0, None
    for _ in range(150):
        fresh = Step(tables, prompts)
        onward = None if step is None else carrying.onward(step)
        begun = any(start % BLOCK == 0 for start in starts) or any(
            sharing and sharing.start(start, prompt) != sharing.start(start - 1, prompt)
            for start, prompt in zip(starts, prompts, strict=True)
        )
        if step is not None:
            assert (onward is None) == begun
        carried += onward is not None
        given, step = told(carrying, onward or fresh, starts)
        wanted, _ = told(anew, replace(fresh), starts)
        assert len(given) == LOOPS
        for one, other in zip(given, wanted, strict=True):
            assert_same(one, other)
        starts = [start + 1 for start in starts]
    assert carried > 100


def test_steps_that_are_not_carried_on():
    """Of several tokens per request, or of rows in flight."""
    machine = passes(None)
    machine.step = Step(torch.zeros(LOOPS, 1, WIDTH, dtype=torch.int32))
    assert machine.onward(machine.step) is None
    machine.lockstep([Chunk(0, 3, 2, 0, LOOPS)])
    assert machine.onward(machine.step) is None


def test_each_loop_asks_its_own_builder(monkeypatch):
    """Some attention backends hand out what their builder overwrites when it is asked again."""

    class Group:
        def __init__(self):
            self.table = torch.zeros(1, WIDTH, dtype=torch.int32)

        def get_metadata_builder(self):
            return None

        def build_metadata(self, common):
            self.table[:, : common.block_table_tensor.shape[1]] = common.block_table_tensor
            return self.table

    monkeypatch.setattr(runner, "at_other_blocks", lambda *_: None)
    machine = passes(None)
    machine.step = Step(torch.randint(100, (LOOPS, 1, WIDTH), dtype=torch.int32))
    own = LoopPasses.__new__(LoopPasses)
    own._attention, own._made = [Group() for _ in range(LOOPS)], (None, None)
    made = [own._metadata(common, loop) for loop, common in enumerate(machine.lockstep([Chunk(0, 3, 1, 0, LOOPS)]))]
    assert [table[0, 0] for table in made] == machine.step.tables[:, 0, 0].tolist()
