"""What passes read and write, without an engine: steps that carry on what the step before laid out."""

import random
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from ouro_vllm import runner
from ouro_vllm.runner import LoopPasses
from ouro_vllm.sharing import LAST, Sharing
from ouro_vllm.wavefront.flight import Row
from ouro_vllm.wavefront.tensors import Passes, Step
from ouro_vllm.wavefront.waves import Chunk, Counts

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


def dealt(seed, window):
    """Dice, and with them a rule of sharing, None without a window, and the lengths of three prompts."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    sharing = None if window is None else Sharing(LAST, window, BLOCK)
    return dice, sharing, [dice.randint(1, 100) for _ in range(3)]


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
    dice, sharing, prompts = dealt(seed, window)
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


def in_flight(dice, lanes, most=150):
    """(lane, row) of random flights: consecutive positions, none deeper than the one before it."""
    rows, slots = [], iter(range(64))
    for lane in dice.sample(range(lanes), lanes):
        first, count = dice.randint(0, most), dice.randint(1, 3 * LOOPS)
        depths = sorted((dice.randrange(LOOPS) for _ in range(count)), reverse=True)
        rows += [(lane, Row(first + place, 0, next(slots), depth)) for place, depth in enumerate(depths)]
    return rows


def one_pass(machine, step, rows, chunks=()):
    """What the model is told in a pass of these, and the hidden states it is given; the pool is left counted up."""
    told = []
    machine.pool = torch.arange(64.0)[:, None].repeat(1, HIDDEN)
    machine.embed = lambda tokens: torch.full((len(tokens), HIDDEN), -1.0)
    machine.model = lambda positions, hidden, common: told.append((hidden, common)) or hidden + 1000
    machine.step = replace(step, chunk_ids=torch.zeros(sum(chunk.tokens for chunk in chunks), dtype=torch.int64))
    machine.run(rows, [], chunks, 1)
    return told[0]


def slots_read(common):
    """Of each query of a pass, the slots of the keys that it sees."""
    seen = []
    for number in range(common.num_reqs):
        queries = int(common.query_start_loc[number + 1] - common.query_start_loc[number])
        ends = range(int(common.seq_lens[number]) - queries + 1, int(common.seq_lens[number]) + 1)
        table = common.block_table_tensor[number].tolist()
        seen += [[table[at // BLOCK] * BLOCK + at % BLOCK for at in range(end)] for end in ends]
    return seen


@pytest.mark.parametrize("window", [None, 8, 40])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_rows_that_share_a_sequence_read_what_each_of_them_would(window, kernels, seed):
    """Guesses that entered together stand at one depth, side by side: their keys are to be read once for all."""
    dice, sharing, prompts = dealt(seed, window)
    step = Step(torch.randperm(1000)[: (LOOPS * 3 * WIDTH)].reshape(LOOPS, 3, WIDTH).int(), prompts)
    rows = in_flight(dice, lanes=3)
    chunks = [Chunk(0, 200, 1, 0, LOOPS), Chunk(1, 205, 3, 1, LOOPS)]
    hidden, common = one_pass(passes(sharing, kernels), step, rows, chunks)
    everyone = [(lane, row.position, row.depth) for lane, row in rows]
    everyone += [(chunk.index, chunk.start + place, 0) for chunk in chunks for place in range(chunk.tokens)]
    seen, starts = slots_read(common), []
    for number, (lane, position, depth) in enumerate(everyone):
        own, shared = step.tables[depth, lane].tolist(), step.tables[-1, lane].tolist()
        start = 0 if sharing is None else sharing.start(position, prompts[lane])
        starts.append(start)
        blocks = [shared[at] if (at + 1) * BLOCK <= start else own[at] for at in range(WIDTH)]
        assert seen[number] == [blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(position + 1)]
        assert common.slot_mapping[number] == own[position // BLOCK] * BLOCK + position % BLOCK
    assert common.positions.tolist() == [position for _, position, _ in everyone]
    given = [-1.0 if row.depth == 0 else float(row.slot) for _, row in rows] + [-1.0] * 4
    assert hidden[:, 0].tolist() == given
    one_each = list(groupby((lane, row.depth, start) for (lane, row), start in zip(rows, starts, strict=False)))
    assert common.num_reqs == len(one_each) + len(chunks) and len(one_each) < len(rows)
    assert common.is_prefilling.tolist() == [False] * (len(one_each) + 1) + [True]
    if kernels:
        columns = (common.request, common.own, common.position, common.window_start)
        wanted = [(lane, depth, at, start) for (lane, at, depth), start in zip(everyone, starts, strict=True)]
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == wanted


def test_what_a_pass_computes_stays_with_its_row():
    machine, rows = passes(None), in_flight(random.Random(7), lanes=3)
    one_pass(machine, Step(torch.zeros(LOOPS, 3, WIDTH, dtype=torch.int32)), rows)
    for _, row in rows:
        assert machine.pool[row.slot, 0] == 1000 + (row.slot if row.depth else -1)


@pytest.mark.parametrize("seed", range(5))
def test_attention_of_rows_together_is_that_of_each_alone(seed):
    """vLLM's own kernel for CPUs, float32, on caches that are NaN in blocks that no row is to read.

    Where a block ends behind a row, that kernel multiplies what it does not read by 0: there it is large instead.
    """
    dice, heads, size = random.Random(seed), 3, 32
    torch.manual_seed(seed)
    rows, step = in_flight(dice, lanes=3), Step(torch.randperm(LOOPS * 3 * WIDTH).reshape(LOOPS, 3, WIDTH).int())
    _, common = one_pass(passes(None), step, rows)
    cache = torch.full((LOOPS * 3 * WIDTH, heads, 2 * BLOCK, size), torch.nan)
    keys, values = cache.chunk(2, dim=2)
    seen = slots_read(common)
    written = torch.tensor(sorted({slot for slots in seen for slot in slots}))
    cache[written // BLOCK] = 1e4
    key, value = torch.randn(2, len(written), heads, size)
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, written, "vec")
    query = torch.randn(len(rows), heads, size)
    output = torch.full_like(query, torch.nan)
    starts, lengths, scale = common.query_start_loc, common.seq_lens, size**-0.5
    plan = ops.cpu_attn_get_scheduler_metadata(
        common.num_reqs, heads, heads, size, lengths, torch.float32, starts, True, -1, "vec", True
    )
    ops.cpu_attention_with_kv_cache(
        query, keys, values, output, starts, lengths, scale, True, None, -1, common.block_table_tensor, 0.0, plan, None
    )
    place = {int(slot): number for number, slot in enumerate(written)}
    for number, slots in enumerate(seen):
        of = [place[slot] for slot in slots]
        chances = (torch.einsum("hd,nhd->hn", query[number], key[of]) * scale).softmax(-1)
        torch.testing.assert_close(output[number], torch.einsum("hn,nhd->hd", chances, value[of]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("slots", "limit", "larger"), [(40, 90, [48, 64]), (90, 40, [])])
def test_every_size_is_compiled_before_the_first_request(slots, limit, larger):
    """As far as there are slots for its rows and passes have room for them. What the pace tells apart is timed as well,
    be there slots or not: passes with prompts in them are larger."""
    ran, counts = [], Counts()

    def run(rows, *_):
        ran.append(len(rows))
        assert all(row.slot < slots for _, row in rows)

    machine = SimpleNamespace(pool=torch.zeros(slots, 1), run=run)
    machine.kept = lambda rows: torch.zeros(len(rows), 1)
    waves = SimpleNamespace(machine=machine, counts=counts, limit=limit)
    own = SimpleNamespace(_waves=waves, device=torch.device("cpu"))
    own._pool, own.model = SimpleNamespace(groups=[0]), SimpleNamespace(compute_logits=lambda hidden: hidden)
    LoopPasses.time_passes(own)
    assert list(dict.fromkeys(ran)) == [*range(1, 33), 34, 36, 38, 40, *larger]
    timed = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, *larger]
    assert [rows for rows, _ in counts.shapes] == [size for size in timed for _ in range(3)]


def test_rows_beyond_those_asked_for_write_nowhere(monkeypatch):
    told, dispatched = {}, (CUDAGraphMode.NONE, SimpleNamespace(num_tokens=33))
    monkeypatch.setattr(runner, "set_forward_context", lambda *_, **fields: told.update(fields) or nullcontext())
    monkeypatch.setattr(runner, "get_forward_context", SimpleNamespace)
    model = SimpleNamespace(model=lambda positions, hidden: torch.stack([positions.float(), hidden[:, 0]], dim=1))
    own = SimpleNamespace(device=torch.device("cpu"), vllm_config=None, _layers={"layer": None})
    own.cudagraph_dispatcher = SimpleNamespace(dispatch=lambda **_: dispatched)
    own._metadata, own.get_model = lambda common: common, lambda: model
    positions, hidden, slots = torch.arange(33), torch.randn(33, 1), torch.arange(33) + 100
    output = LoopPasses._one_pass(own, positions, hidden, SimpleNamespace(slot_mapping=slots))
    assert torch.equal(output, torch.stack([positions.float(), hidden[:, 0]], dim=1))
    assert told["num_tokens"] == 34 and told["slot_mapping"]["layer"].tolist() == [*slots.tolist(), PAD_SLOT_ID]


@pytest.mark.parametrize(
    ("start", "tokens", "resumed", "bare", "stages"),
    [
        (61, 38, [], False, 1),  # the row behind it is the prompt's last token's
        (61, 39, [], False, 2),  # it is a generated token's, which reads what the loops of the prompt share
        (61, 41, [], False, 3),  # two generated tokens more are computed again
        (0, 61, [], False, 1),
        (0, 61, ["a"], False, 2),
        (61, 41, [], True, 2),
    ],
)
def test_rows_wait_for_what_they_read_as_shared(start, tokens, resumed, bare, stages):
    """Of a request that was preempted, whose prompt of 100 tokens and newer ones are computed again in pieces."""
    own = SimpleNamespace(
        _sharing=Sharing(LAST, 20, 32), _bare=bare, requests={"a": SimpleNamespace(num_prompt_tokens=100)}
    )
    own.input_batch = SimpleNamespace(req_ids=["a"])
    own._scheduled = SimpleNamespace(scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=resumed))
    assert len(LoopPasses._stages(own, [Chunk(0, start, tokens, 0, 4)])) == stages
