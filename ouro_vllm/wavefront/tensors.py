"""Runs the passes of `waves` on vLLM's model, KV cache and attention.

Rows of every depth go through one attention call per layer: the caches of all loops are one pool of blocks, so a row's
loop shows only in the block ids it is given (see `ouro_vllm.kv`). Where loops share older keys and values, a
row's table is put together from two: shared blocks before its window, its own loop's from there on (see
`ouro_vllm.sharing`).
To the attention backend a chunk is a sequence of many queries. So are rows of one request that stand side by side at
one depth, as guesses do that entered together: their keys and values are read once for all of them. Any other row is a
sequence of one query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from ouro_vllm.exits import ExitPick
from ouro_vllm.kv import fold
from ouro_vllm.sharing import Sharing
from ouro_vllm.wavefront.flight import Row
from ouro_vllm.wavefront.waves import Chunk


class Span(NamedTuple):
    """A sequence of a pass: `tokens` positions of batch row `lane` up to `end`, none after it, at one depth.

    depth: loops they have run. chunk: see `Chunk`; rows otherwise.
    """

    lane: int
    end: int
    tokens: int
    depth: int
    chunk: bool


@dataclass(frozen=True)
class Layout:
    """What a pass of S sequences with N tokens in all has in common with one that runs their next loop.

    On the host: lanes: batch rows [S]; ends: behind their last positions; counts: tokens of each; starts_at: where
    their windows begin.
    On the device: lane: `lanes`. row: the same, counted on from depth to depth. before: whether a block [S, W] lies
    before the window, None if none does. block: each token's [N], counted through all blocks of all sequences; offset:
    its place in that block. fields: of vLLM's CommonAttentionMetadata, all but block table and slots.
    """

    lanes: Sequence[int]
    ends: Sequence[int]
    counts: Sequence[int]
    starts_at: Sequence[int]
    lane: torch.Tensor
    row: torch.Tensor
    before: torch.Tensor | None
    block: torch.Tensor
    offset: torch.Tensor
    fields: dict[str, Any]

    def onward(self) -> "Layout":
        """Of the same sequences one position on, each of one token, in the same blocks."""
        moved = {name: self.fields[name] + 1 for name in ("seq_lens", "seq_lens_cpu_upper_bound", "positions")}
        fields = dict(self.fields, **moved, max_seq_len=self.fields["max_seq_len"] + 1)
        return replace(self, ends=[end + 1 for end in self.ends], offset=self.offset + 1, fields=fields)


@dataclass
class Step:
    """What stays the same over all passes of an engine step.

    tables: block ids [G, B, W], int32, of loop g + 1, batch row b, block w; under sharing the last is what is shared.
    prompts: tokens in the prompt, per batch row; read under sharing only.
    chunk_ids: token ids [C] of all chunks, in their order, deepest first; chunk_hidden: their hidden states [C, D]
        after the passes they were in. exits: where the gate lets them go, if it is asked for any. lockstep: of
        chunks alone, their layout and the blocks of all loops (see `Passes._blocks`); chunks only ever leave, so that
        it holds as long as their number does, and until there are rows in a pass.
    """

    tables: torch.Tensor
    prompts: Sequence[int] = ()
    chunk_ids: torch.Tensor | None = None
    chunk_hidden: torch.Tensor | None = None
    exits: ExitPick | None = None
    lockstep: tuple[Layout, torch.Tensor, torch.Tensor] | None = None

    @property
    def chunks_read(self) -> torch.Tensor | None:
        """Hidden states [C, D] that the chunks are read from."""
        return self.chunk_hidden if self.exits is None else self.exits.hidden


class Passes:
    """`waves.Machine` on vLLM.

    embed: token ids [N] -> [N, D]. model: (positions [N], hidden [N, D], vLLM's CommonAttentionMetadata) -> [N, D].
    choose: (hidden [M, D], M times (lane index, row)) -> tokens [M]; sets `exit` of rows that the gate lets go.
    loops: R. sharing: how loops share keys and values, None if they do not. caches: where the mean over loops is to be
        written, the KV cache of each layer, [blocks, ...]; else none. kernels: attention is ours (`kernels.backend`).
    """

    def __init__(
        self,
        slots: int,
        hidden_size: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        embed: Callable[[torch.Tensor], torch.Tensor],
        model: Callable[[torch.Tensor, torch.Tensor, CommonAttentionMetadata], torch.Tensor],
        choose: Callable[[torch.Tensor, Sequence[tuple[int, Row]]], list[int]],
        loops: int,
        sharing: Sharing | None = None,
        caches: Sequence[torch.Tensor] = (),
        kernels: bool = False,
    ) -> None:
        self.block_size, self.device = block_size, device
        self.embed, self.model, self.choose = embed, model, choose
        self.loops, self.sharing, self.caches, self.kernels = loops, sharing, caches, kernels
        self.pool = torch.zeros(slots, hidden_size, dtype=dtype, device=device)
        self.departed = torch.zeros_like(self.pool)  # of rows that the gate let go: what they were read from
        self.step: Step | None = None

    def run(
        self, rows: Sequence[tuple[int, Row]], read: Sequence[int], chunks: Sequence[Chunk], loop: int
    ) -> list[int]:
        """See `waves.Machine`. Hidden states of rows are read from and written to the pool at their slots."""
        step = self.step
        assert step is not None
        if rows:
            spans = self._together(rows) + _in_lockstep(chunks, loop)
            new = [row for _, row in rows if row.depth == 0]
            columns = [row.slot for _, row in rows], [row.slot for row in new], [row.token for row in new], read
            layout, (slots, entered, tokens, seen) = self._layout(spans, *columns)
            step.lockstep = None
            depths = [span.depth for span in spans]
            table, written = self._blocks(layout)
            if new:
                self.pool.index_copy_(0, entered, self.embed(tokens))
            hidden = self.pool.index_select(0, slots)
        else:
            layout, table, written = self._all_loops(chunks)
            depths, table, written = [loop - 1] * len(chunks), table[loop - 1], written[loop - 1]
        if chunks:
            if loop == 1:
                step.chunk_hidden = self.embed(step.chunk_ids)
            running = sum(chunk.tokens for chunk in chunks)  # of the first chunks; those behind are done
            chunk_hidden = step.chunk_hidden[:running]
            hidden = torch.cat([hidden, chunk_hidden]) if rows else chunk_hidden
        output = self.model(layout.fields["positions"], hidden, self._common(layout, depths, table, written))
        if rows:
            self.pool.index_copy_(0, slots, output[: len(rows)])
        if chunks:
            step.chunk_hidden[:running] = output[len(rows) :]
            if step.exits is not None:
                step.exits.take(loop, step.chunk_hidden[:running])
        self.fold(rows, chunks, loop)
        if not read:
            return []
        hidden = output if len(read) == output.shape[0] else output.index_select(0, seen)
        chosen = self.choose(hidden, [rows[number] for number in read])
        gone = [number for number in read if rows[number][1].exit == rows[number][1].depth + 1]
        if gone:
            places, at = self._sent([rows[number][1].slot for number in gone], gone)
            self.departed.index_copy_(0, places, output.index_select(0, at))
        return chosen

    def lockstep(self, chunks: Sequence[Chunk]) -> list[CommonAttentionMetadata]:
        """vLLM's metadata of all loops of chunks that run them in turn."""
        layout, tables, written = self._all_loops(chunks)
        return [self._common(layout, [loop] * len(chunks), tables[loop], written[loop]) for loop in range(self.loops)]

    def _all_loops(self, chunks: Sequence[Chunk]) -> tuple[Layout, torch.Tensor, torch.Tensor]:
        """See `Step.lockstep`."""
        step = self.step
        if step.lockstep is None or len(step.lockstep[0].lanes) != len(chunks):
            layout, _ = self._layout(_in_lockstep(chunks, loop=1))
            step.lockstep = layout, *self._blocks(layout, self.loops)
        return step.lockstep

    def onward(self, step: Step) -> Step | None:
        """The step behind one of chunks of one token each, if all of its requests and nobody else go on.

        None where a sequence gets to another block, or its window does.
        """
        if step.lockstep is None:
            return None
        layout, table, written = step.lockstep
        if layout.fields["max_query_len"] > 1:
            return None
        for index, end, start in zip(layout.lanes, layout.ends, layout.starts_at, strict=True):
            if end % self.block_size == 0:
                return None
            if self.sharing is not None and self.sharing.start(end, step.prompts[index]) != start:
                return None
        return Step(step.tables, step.prompts, lockstep=(layout.onward(), table, written + 1))

    def _sent(self, *columns: Sequence[int]) -> Sequence[torch.Tensor]:
        """Whole numbers, on the device: one copy of all columns, int64."""
        together = torch.from_numpy(np.array(list(chain(*columns)), dtype=np.int64))
        return together.to(self.device, non_blocking=True).split([len(column) for column in columns])

    def _together(self, rows: Sequence[tuple[int, Row]]) -> list[Span]:
        """Rows as sequences, in their order. Those of one follow each other at one depth and have one window."""
        spans: list[Span] = []
        shares, last = self.sharing is not None, (-1, -1, -1, -1)  # lane, depth, end and window of the sequence at hand
        for lane, row in rows:
            position = row.position
            here = lane, row.depth, position, self._window_at(lane, position + 1) if shares else 0
            if here == last:
                spans[-1] = spans[-1]._replace(end=position + 1, tokens=spans[-1].tokens + 1)
            else:
                spans.append(Span(lane, position + 1, 1, row.depth, False))
            last = lane, row.depth, position + 1, here[3]
        return spans

    def _window_at(self, lane: int, end: int) -> int:
        """First position that the one before `end` reads of its own loop, under sharing."""
        return self.sharing.start(end - 1, self.step.prompts[lane])

    def _layout(self, spans: Sequence[Span], *more: Sequence[int]) -> tuple[Layout, Sequence[torch.Tensor]]:
        """Of sequences, in this order; and more columns of whole numbers, sent along with it."""
        size, number, (_, requests, width) = self.block_size, len(spans), self.step.tables.shape
        lanes, ends, counts, depths, _ = zip(*spans, strict=True)
        # Lists: of so few numbers, and between passes that fill the processor's caches, numpy takes twice as long.
        positions: list[int] = []
        blocks: list[int] = []
        starts = [0]
        for first, (end, tokens) in zip(range(0, number * width, width), zip(ends, counts, strict=True), strict=True):
            here = range(end - tokens, end)
            positions += here
            blocks += [first + position // size for position in here]
            starts.append(len(positions))
        offsets = [position % size for position in positions]
        rows = [lane + depth * requests for lane, depth in zip(lanes, depths, strict=True)]
        lane, row, at, block, offset, *sent = self._sent(lanes, rows, positions, blocks, offsets, *more)
        starts_at, before = [0] * number, None
        if self.sharing is not None:
            starts_at = [self._window_at(span.lane, span.end) for span in spans]
        if any(starts_at):
            before = torch.arange(width) < torch.tensor(starts_at)[:, None] // size
            before = before.to(self.device, non_blocking=True)
        on_host = torch.from_numpy(np.array([*starts, *ends], dtype=np.int32)).split([number + 1, number])
        bounds = [column.to(self.device, non_blocking=True) for column in on_host]
        fields = dict(
            query_start_loc=bounds[0],
            query_start_loc_cpu=on_host[0],
            seq_lens=bounds[1],
            seq_lens_cpu_upper_bound=on_host[1],
            num_reqs=number,
            num_actual_tokens=len(positions),
            max_query_len=max(counts),
            max_seq_len=max(ends),
            positions=at,
            is_prefilling=torch.from_numpy(np.array([span.chunk and span.tokens > 1 for span in spans])),
        )
        return Layout(lanes, ends, counts, starts_at, lane, row, before, block, offset, fields), sent

    def _blocks(self, layout: Layout, loops: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Block ids [S, W] that sequences read, each at its own depth, and slots [N] that their tokens write.

        Shared blocks before their windows, then their own. loops: of all so many, one more dimension.
        """
        tables = self.step.tables
        if loops:
            table = tables[:loops].index_select(1, layout.lane)
        else:
            table = tables.flatten(0, 1).index_select(0, layout.row)
        if layout.before is not None:
            table = torch.where(layout.before, tables[-1].index_select(0, layout.lane), table)
        blocks = table.flatten(-2).index_select(-1, layout.block)
        return table, torch.add(layout.offset, blocks, alpha=self.block_size)

    def _common(
        self, layout: Layout, depths: list[int], table: torch.Tensor, written: torch.Tensor
    ) -> CommonAttentionMetadata:
        """vLLM's metadata of a pass; for our kernels with every loop's tables and what each query reads.

        depths: loop - 1 per sequence. table, written: see `_blocks`.
        """
        fields = dict(layout.fields, block_table_tensor=table, slot_mapping=written)
        if not self.kernels:
            return CommonAttentionMetadata(**fields)
        from ouro_vllm.kernels.backend import LoopCommonMetadata

        tables, counts = self.step.tables, np.array(layout.counts)
        return LoopCommonMetadata(
            **fields,
            tables=tables,
            request=np.repeat(layout.lanes, counts),
            own=np.repeat(depths, counts),
            position=np.arange(counts.sum()) + np.repeat(layout.ends - counts.cumsum(), counts),
            window_start=np.repeat(layout.starts_at, counts),
            shared=[tables.shape[0] - 1] * tables.shape[1],
        )

    def fold(self, rows: Sequence[tuple[int, Row]], chunks: Sequence[Chunk], loop: int) -> None:
        """Blocks of which a pass ran the last loop of the last position: write the mean over their loops, if asked to.

        A block is read as shared from `window` positions behind its end on, which no row has reached yet.
        """
        if not self.caches:
            return
        ends = [(index, row.position + 1) for index, row in rows if row.depth + 1 == self.loops]
        done = [(index, end // self.block_size - 1) for index, end in ends if end % self.block_size == 0]
        if loop == self.loops:
            for chunk in chunks:
                full = range(chunk.start // self.block_size, (chunk.start + chunk.tokens) // self.block_size)
                done += [(chunk.index, block) for block in full]
        if done:
            lane, block = torch.tensor(done, dtype=torch.int64).to(self.device, non_blocking=True).unbind(1)
            ids = self.step.tables[:, lane, block].long()
            for cache in self.caches:
                if self.kernels:
                    from ouro_vllm.kernels.kv_fold import kv_fold

                    kv_fold(*cache.transpose(1, 2).chunk(2, dim=-1), ids[:-1].T.int(), ids[-1].int())
                else:
                    fold(cache, ids[:-1].T, ids[-1])

    def kept(self, rows: Sequence[Row]) -> torch.Tensor:
        """Hidden states [len(rows), D] that rows are read from: after the gate let them go, or else as they are now."""
        (slots,) = self._sent([row.slot for row in rows])
        hidden = self.pool.index_select(0, slots)
        gone = [number for number, row in enumerate(rows) if row.exit]
        if gone:
            (places,) = self._sent(gone)
            hidden[places] = self.departed[slots[places]]
        return hidden


def _in_lockstep(chunks: Sequence[Chunk], loop: int) -> list[Span]:
    """Chunks as sequences, as they run `loop`."""
    return [Span(chunk.index, chunk.start + chunk.tokens, chunk.tokens, loop - 1, chunk=True) for chunk in chunks]
