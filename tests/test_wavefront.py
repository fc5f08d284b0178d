"""The wavefront's logic against a brute-force model: no torch, no vLLM, every key and value accounted for.

`Text` stands for the language model, `Memory` for the KV cache, `Machine` for the passes, and `Engine` for vLLM's
scheduler and sampler together with what `ouro_vllm.runner` does with `Waves`.
"""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_vllm.noise import key
from ouro_vllm.wavefront.flight import Flight, Row, complete
from ouro_vllm.wavefront.lookup import LONGEST, MOST_LEARNED, SHORTEST, Lookup
from ouro_vllm.wavefront.pacing import passes_per_token, rows_per_token
from ouro_vllm.wavefront.waves import GUESSES, Chunk, Counts, Lane, Waves, must_fit, slots_needed

BLOCK = 4  # positions per block of the KV cache
STOP = 0  # the token that ends an answer, for requests that have one
KEYS = 1 << 63  # how many keys there are


# The model.


class Text:
    """A language model over `words` tokens: a fixed random function of everything up to and including a position.

    A prefix (all tokens of a request up to a position) is a number, so that comparing two costs next to nothing.
    """

    def __init__(self, loops: int, words: int, agreement: float, seed: int, leaving: float = 0.0) -> None:
        """agreement: chance that a readout before the last loop equals the last one's, independently for each.

        leaving: chance that the gate lets a row go at a loop before its last, independently for each."""
        self.loops, self.words, self.agreement, self.leaving = loops, words, agreement, leaving
        self.hashes = [seed]
        self.followers: dict[tuple[int, int], int] = {}
        self.heard: dict[tuple[int, int], int] = {}

    def after(self, prefix: int, token: int) -> int:
        """The prefix that is one token longer."""
        if (prefix, token) not in self.followers:
            self.followers[prefix, token] = len(self.hashes)
            self.hashes.append(key(self.hashes[prefix], token))
        return self.followers[prefix, token]

    def path(self, prefix: int, tokens: Iterable[int]) -> list[int]:
        """The prefixes that end in each of `tokens`."""
        found = []
        for token in tokens:
            prefix = self.after(prefix, token)
            found.append(prefix)
        return found

    def readout(self, prefix: int, depth: int) -> int:
        """What a row of `depth` loops at the end of `prefix` proposes."""
        if (prefix, depth) not in self.heard:
            self.heard[prefix, depth] = self.choose(prefix, depth)
        return self.heard[prefix, depth]

    def choose(self, prefix: int, depth: int) -> int:
        seed = self.hashes[prefix]
        final = key(seed, -1) % self.words
        if depth == self.loops or key(seed, -1 - depth) < self.agreement * KEYS:
            return final
        return (final + 1 + key(seed, -1001 - depth) % (self.words - 1)) % self.words

    def exit(self, prefix: int, loops: int, gated: bool) -> int:
        """The loop after which the row at the end of `prefix` is read, of a request of so many loops."""
        leaves = (loop for loop in range(1, loops) if key(self.hashes[prefix], -2001 - loop) < self.leaving * KEYS)
        return next(leaves, loops) if gated else loops

    def plain(self, request: "Request") -> list[int]:
        """The answer of plain decoding."""
        prefix, answer = self.path(request.root, request.tokens[: request.prompt])[-1], []
        while len(answer) < request.longest and request.stops.isdisjoint(answer[-1:]):
            answer.append(self.readout(prefix, self.exit(prefix, request.loops, request.gated)))
            prefix = self.after(prefix, answer[-1])
        return answer


class Settling(Text):
    """A text whose readouts are final from a given loop on, and say one and the same wrong token before.

    settles: that loop, for each row of plain decoding after a prompt of the one token 1, per root from 0 on. Rows that
    stand on a wrong token are sure of what they say.
    """

    def __init__(self, loops: int, *settles: Sequence[int]) -> None:
        super().__init__(loops, 7, 1.0, 1)
        self.roots = [0] + [self.after(0, -number) for number in range(1, len(settles))]
        self.settles: dict[int, int] = {}
        for root, settle in zip(self.roots, settles, strict=True):
            prefix = self.after(root, 1)
            for loop in settle:
                self.settles[prefix] = loop
                prefix = self.after(prefix, self.readout(prefix, loops))

    def choose(self, prefix: int, depth: int) -> int:
        final = key(self.hashes[prefix], -1) % self.words
        return final if depth >= self.settles.get(prefix, 1) else (final + 1) % self.words


# The KV cache and the passes.


class Memory:
    """For every loop and place: the prefix whose last token wrote the keys and values there.

    Blocks are handed out again with what was in them, and may stand in several requests' tables.
    """

    def __init__(self, loops: int) -> None:
        self.written: list[dict[int, int]] = [{} for _ in range(loops + 1)]
        self.free: list[int] = []
        self.made = 0
        self.shared: set[int] = set()

    def grow(self, table: list[int], positions: int) -> None:
        """Blocks for so many positions. table: place of every position."""
        while len(table) < positions:
            if self.free:
                block = self.free.pop()
            else:
                block, self.made = self.made, self.made + 1
            table += range(block * BLOCK, (block + 1) * BLOCK)

    def share(self, table: list[int], positions: int) -> list[int]:
        """The first whole blocks of `positions` for another table."""
        places = table[: positions // BLOCK * BLOCK]
        self.shared.update(place // BLOCK for place in places)
        return places

    def shrink(self, table: list[int], positions: int) -> None:
        """Give back the blocks behind so many positions. What was ever shared is kept, for simplicity."""
        self.free += [place // BLOCK for place in table[positions::BLOCK] if place // BLOCK not in self.shared]
        del table[positions:]


@dataclass
class View:
    """What the machine is told of a lane.

    path: the prefixes that are certain or scheduled. root: the prefix before the first token.
    scheduled: rows before this position are the scheduler's doing; limit: none else may enter from this one on.
    passes: counts those that had rows of this lane.
    """

    root: int
    path: list[int]
    table: list[int]
    flight: Flight
    prompt: int
    scheduled: int
    limit: int
    stops: frozenset[int]
    passes: int = 0


class Broken(Exception):
    """A pass that fails."""


class Machine:
    """`waves.Machine` that runs nothing and checks everything."""

    def __init__(self, text: Text, memory: Memory) -> None:
        self.text, self.memory = text, memory
        self.waves: Waves
        self.slots = 0
        self.lanes: dict[int, View] = {}
        self.pool: dict[int, tuple[int, int]] = {}  # slot: (prefix, depth) of the hidden state kept there
        self.departed: dict[int, tuple[int, int]] = {}  # the same, of what rows were read from that the gate let go
        self.ran: dict[int, int] = {}  # start of a chunk in its lane: loops that it has run
        self.fuse: int | None = None  # passes until one fails
        self.passes = self.rows = self.entered = self.reads = 0
        self.heard: dict[int, list[int]] = {}  # slot: depths at which the row there was read
        # Of rows that ran all loops, per depth: read there; read there and right; read everywhere, settled there.
        self.judged, self.agreed, self.settled = Counter(), Counter(), Counter()

    def run(
        self, rows: Sequence[tuple[int, Row]], read: Sequence[int], chunks: Sequence[Chunk], loop: int
    ) -> list[int]:
        """One pass: everything is written, then everything is read."""
        assert len(rows) + sum(chunk.tokens for chunk in chunks) <= self.waves.limit, "more than fits in a pass"
        self.check_slots()
        stands: dict[int, int] = {}  # id of a row: the prefix it stands on
        paths = {index: self.standing(self.lanes[index], stands) for index in {index for index, _ in rows}}

        writes: list[tuple[int, int, int]] = []  # loop, place, prefix
        reads: list[tuple[int, list[int], list[int]]] = []  # loop, places, the prefixes they should hold
        for index, row in rows:
            view, end = self.lanes[index], row.position + 1
            prefix = stands.pop(id(row))  # a row is in its flight, and runs once in a pass
            assert row.depth < view.flight.loops
            assert end <= len(view.table), "outside of what is allocated"
            if row.depth:
                assert self.pool[row.slot] == (prefix, row.depth), "another row's hidden state"
            else:
                self.entered += 1
                self.heard[row.slot] = []
                self.check_entry(view, row)
            writes.append((row.depth + 1, view.table[row.position], prefix))
            reads.append((row.depth + 1, view.table[:end], paths[index][:end]))
        assert all(one.loops >= other.loops for one, other in pairwise(chunks)), "the deepest chunk is the first"
        for chunk in chunks:
            assert loop == self.ran.get(chunk.index, 0) + 1 <= chunk.loops, "chunks run loop after loop"
            self.ran[chunk.index] = loop
            view, end = self.lanes[chunk.index], chunk.start + chunk.tokens
            writes += [(loop, view.table[at], view.path[at]) for at in range(chunk.start, end)]
            reads.append((loop, view.table[:end], view.path[:end]))  # of its last position, which reads what all read

        assert len({write[:2] for write in writes}) == len(writes), "two rows write to one place"
        for depth, place, prefix in writes:
            self.memory.written[depth][place] = prefix
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Broken
        for depth, places, prefixes in reads:
            assert list(map(self.memory.written[depth].get, places)) == prefixes, "stale or missing keys and values"

        for (depth, _, prefix), (_, row) in zip(writes, rows, strict=False):
            self.pool[row.slot] = (prefix, depth)
        for index in {index for index, row in rows if not row.exit}:
            self.lanes[index].passes += 1
        self.passes += bool(rows)
        self.rows += len(rows)
        self.reads += len(read)
        slots = [rows[number][1].slot for number in read]
        for slot in slots:
            self.heard[slot].append(self.pool[slot][1])
        for number, (index, row) in enumerate(rows):
            flight, (prefix, depth) = self.lanes[index].flight, self.pool[row.slot]
            assert not (number in read and row.exit), "read after it was decided"
            if not row.exit and depth == self.text.exit(prefix, flight.loops, flight.gated):
                self.tally(prefix, self.heard[row.slot], depth)
                if depth < flight.loops:
                    assert number in read, "the gate was not asked"
                    row.exit, self.departed[row.slot] = depth, (prefix, depth)
        return [self.text.readout(*self.pool[slot]) for slot in slots]

    def tally(self, prefix: int, heard: list[int], decided: int) -> None:
        """A row on `prefix` that was read at the depths `heard` is decided at this one."""
        if not heard or heard[-1] != decided:  # rows behind it sat out: what decides it is for the verifier to read
            return
        loops = range(1, decided + 1)
        wrong = [depth for depth in loops if self.text.readout(prefix, depth) != self.text.readout(prefix, loops[-1])]
        self.judged.update(heard)
        self.agreed.update(set(heard).difference(wrong))
        if heard == list(loops):
            self.settled[max(wrong, default=0) + 1] += 1

    def standing(self, view: View, stands: dict[int, int]) -> list[int]:
        """The prefixes of all positions as the flight has them; notes those of its rows in `stands`."""
        rows, trail = view.flight.rows, view.flight.trail
        assert len(rows) + len(trail) <= self.waves.most, "more rows than a flight may have"
        assert len(trail) < view.flight.loops, "a trail longer than there are loops to run"
        path = view.path[: rows[0].position] if rows else list(view.path)
        for row in trail:
            before = path[row.position - 1] if row.position else view.root
            assert path[row.position] == self.text.after(before, row.token), "a token that was not committed trails"
            stands[id(row)] = path[row.position]
        for row in rows:
            assert row.position == len(path), "rows do not stand at consecutive positions"
            path.append(self.text.after(path[-1] if path else view.root, row.token))
            stands[id(row)] = path[-1]
        return path

    def check_entry(self, view: View, row: Row) -> None:
        """A row that runs its first loop was scheduled or may run ahead."""
        if row.position < view.scheduled:
            return
        assert row.position < view.limit, "entered at or beyond the end"
        assert row.token not in view.stops, "entered a token that ends the answer"
        behind = [other.token for other in view.flight.rows if view.prompt <= other.position < row.position]
        assert not view.stops.intersection(behind), "entered behind the end of the answer"

    def check_slots(self) -> None:
        """Every slot is free or one row's."""
        taken = [row.slot for flight in self.waves.flights.values() for row in flight.trail + flight.rows]
        assert sorted(self.waves.free + taken) == list(range(self.slots)), "slots leak or are used twice"


# vLLM's part and the runner's.


@dataclass(eq=False)
class Request:
    """A request. root: the prefix before its first token; tokens: prompt, then answer too; longest: of the answer.

    computed: committed positions. drafts: what was proposed last. passes: that had undecided rows of it. loops: its
    depth. gated: the exit gate may read it earlier. draft: what it brings along as
    a guess at its answer.
    """

    name: str
    tokens: list[int]
    longest: int
    loops: int
    root: int = 0
    stops: frozenset[int] = frozenset()
    speculates: bool = True
    gated: bool = False
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    passes: int = 0
    draft: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def finished(self) -> bool:
        return len(self.answer) >= self.longest or not self.stops.isdisjoint(self.answer[-1:])


@dataclass
class Work:
    """What the scheduler gives a request in a step: `count` tokens from `request.computed` on, the last being `drafts`.

    own: the drafts are those the wavefront proposed, or the first of them. ahead: positions allocated beyond.
    """

    request: Request
    count: int
    drafts: list[int]
    own: bool = True
    ahead: int = 100

    @property
    def discarded(self) -> bool:
        """More of the prompt is to come."""
        return self.request.computed + self.count < len(self.request.tokens)


def everything(request: Request) -> Work:
    """All that is left of the prompt, or the newest token and all drafts."""
    return Work(request, len(request.tokens) - request.computed + len(request.drafts), request.drafts)


class Engine:
    """Steps of vLLM with the runner's use of `Waves`; every answer is compared with plain decoding's."""

    def __init__(self, text: Text, passes: int, requests: int = 1, textbook: bool = False, tight: bool = False) -> None:
        """tight: passes have room for what each step needs, and no more."""
        self.text, self.passes, self.textbook, self.requests, self.tight = text, passes, textbook, requests, tight
        self.bare = False  # whether the next step is to run what is scheduled and nothing else
        self.apart = False  # whether rows that nobody waits for sit out in it
        self.awaited = False  # whether somebody waits for a place when the next burst begins
        self.deaf = False  # whether what the next step samples fails to be noted
        self.memory, self.sums = Memory(text.loops), Counts()
        self.machine = Machine(text, self.memory)
        self.waves = self.machine.waves = Waves(text.loops, passes, requests, self.machine)
        self.machine.slots = slots_needed(text.loops, passes, requests)

    def allocate(self, work: Work) -> None:
        """Blocks for what is scheduled and what may run ahead of it. Twice is no more than once."""
        self.memory.grow(work.request.table, work.request.computed + work.count + work.ahead)

    def step(self, works: list[Work], entry: int, passes: int, lost: Iterable[str] = ()) -> None:
        """passes: of the burst. lost: names of requests that are gone, new or without their blocks."""
        for name in lost:
            self.waves.forget(name)
        gated = any(work.request.gated for work in works)  # for whom rows always run ahead
        bare = self.bare and not self.textbook and not gated
        for work in works:
            self.allocate(work)
            if bare and work.drafts:
                work.drafts, work.count = [], 1
        if self.tight:
            self.waves.limit = must_fit(sum(work.count for work in works), self.text.loops, self.requests)
        try:
            lanes, hidden = self.forward(works, entry, bare)
        except Broken:
            self.waves.lose()
            lanes, hidden = self.forward(works, entry)
        for lane, work in zip(lanes, works, strict=True):
            self.verify(lane, work, hidden[lane.index])
        try:
            if self.deaf:
                raise Broken
            drafts = self.draft([lane for lane in lanes if lane.speculates], passes)
        except Broken:
            self.waves.lose()
            drafts = {}
        self.machine.check_slots()
        for lane, work in zip(lanes, works, strict=True):
            request, proposed = work.request, drafts.get(lane.index, [])
            assert len(proposed) <= self.passes
            assert not proposed or len(request.tokens) + len(proposed) <= self.machine.lanes[lane.index].limit
            assert request.stops.isdisjoint(proposed)
            flight = self.waves.flight(request.name, request.loops, request.gated)
            rows, newest = flight.rows, (len(request.tokens) - 1, request.tokens[-1])
            trail = [row.position for row in flight.trail]
            assert trail == list(range(newest[0] - len(trail), newest[0])), "the trail does not end at the newest token"
            assert not rows or (rows[0].position, rows[0].token) == newest, "the oldest row is not the newest token's"
            request.drafts = proposed
            request.passes += self.machine.lanes[lane.index].passes

    def forward(self, works: list[Work], entry: int, bare: bool = False) -> tuple[list[Lane], list[list[int]]]:
        """As `LoopPasses._wave_forward`. Returns, per lane, the prefixes of the hidden states vLLM would get.

        bare: as vLLM's own, past all that is under way.
        """
        waves, lanes, chunks, layout, where = self.waves, [], [], [], 0
        self.machine.lanes, self.machine.ran = {}, {}
        brief = not self.textbook  # every lane has settled drafts and rows for them
        for index, work in enumerate(works):
            request, start, count = work.request, work.request.computed, work.count
            flight = waves.flight(request.name, request.loops, request.gated)
            tokens = (request.tokens + work.drafts)[: start + count]
            limit = min(len(request.table), request.prompt + request.longest - 1)
            claimed = 0
            if bare:
                flight.end, flight.stops = limit, request.stops
            elif work.discarded:
                waves.free += flight.ground()
            else:
                known = len(work.drafts) + 1
                claimed = waves.claim(flight, start + count - known, tokens[-known:])
                flight.end, flight.stops = limit, request.stops
            lead = 0 if flight.missing is None else max(0, start - flight.missing)
            if claimed < count or lead:
                chunks.append(Chunk(index, start - lead, lead + count - claimed, where, request.loops, lead))
            follows = not work.discarded and request.speculates and not (self.textbook and request.gated)
            lookup = Lookup(request.draft, request.prompt) if follows and (entry == 0 or request.draft) else None
            if lookup:
                lookup.extend(request.tokens[: start + count])
            lanes.append(Lane(index, flight, follows, entry, lookup, guesses=1 + (index + start) % GUESSES))
            layout += range(where + count - claimed, where + count)
            where += count
            settled = claimed == count and flight.waiting is None and not lead
            brief = brief and settled and bool(work.drafts) and work.own
            self.machine.lanes[index] = View(
                request.root,
                self.text.path(request.root, tokens),
                request.table,
                flight,
                request.prompt,
                start + count,
                limit if follows else 0,
                request.stops,
            )
        chunks.sort(key=lambda chunk: -chunk.loops)
        boarded, apart = [] if bare else lanes, self.apart and not self.textbook
        before, under_way = self.machine.rows, {lane.index: len(lane.flight.rows) for lane in boarded}
        took = waves.forward(boarded, chunks, not self.textbook, apart)
        assert took <= (1 if brief else self.text.loops)
        if apart and not any(lane.flight.trail or lane.flight.gated for lane in boarded):
            held = sum(lane.flight.held for lane in boarded)
            assert self.machine.rows - before <= took * held, "rows that nobody waits for ran"
            assert all(len(lane.flight.rows) <= max(under_way[lane.index], lane.flight.held) for lane in boarded)

        hidden: dict[int, int] = {}  # place among the step's tokens: prefix
        for chunk in chunks:
            assert self.machine.ran[chunk.index] == chunk.loops
            path = self.machine.lanes[chunk.index].path[chunk.start + chunk.lead : chunk.start + chunk.tokens]
            hidden |= zip(range(chunk.where, chunk.where + chunk.tokens - chunk.lead), path, strict=True)
        kept = []
        for lane in [] if bare else lanes:
            for row in lane.flight.rows[: lane.flight.held]:
                kept.append((self.machine.departed if row.exit else self.machine.pool)[row.slot])
                decided = self.text.exit(kept[-1][0], lane.flight.loops, lane.flight.gated)
                assert kept[-1][1] == decided, "a row that somebody waits for is not done"
        assert hidden.keys().isdisjoint(layout)
        hidden |= zip(layout, (prefix for prefix, _ in kept), strict=True)
        places = iter(range(where))
        return lanes, [[hidden[next(places)] for _ in range(work.count)] for work in works]

    def verify(self, lane: Lane, work: Work, hidden: list[int]) -> None:
        """What vLLM's rejection sampler does, greedily, and `LoopPasses.propose_draft_token_ids`."""
        request, view = work.request, self.machine.lanes[lane.index]
        assert hidden == view.path[request.computed :], "hidden states of other tokens"
        if work.discarded:
            request.computed += work.count
            return
        decided = [
            self.text.readout(prefix, self.text.exit(prefix, request.loops, request.gated))
            for prefix in hidden[-len(work.drafts) - 1 :]
        ]
        accepted = 0
        while accepted < len(work.drafts) and work.drafts[accepted] == decided[accepted]:
            accepted += 1
        if work.own and not self.textbook:
            assert accepted == len(work.drafts), "a settled draft is not accepted"
        request.tokens += decided[: accepted + 1]
        request.computed = len(request.tokens) - 1
        expected = self.text.plain(request)
        assert request.answer == expected[: len(request.answer)], "not what plain decoding answers"

        view.path = self.text.path(request.root, request.tokens)
        if lane.lookup is not None:
            lane.lookup.extend(request.tokens[len(lane.lookup.tokens) :])
        if self.deaf:
            return
        flight, position = view.flight, len(request.tokens) - 1
        self.waves.restart(flight, position, request.tokens[-1])
        if request.tokens[-1] in flight.stops or position >= flight.end:
            self.waves.free += flight.ground()

    def draft(self, lanes: list[Lane], passes: int) -> dict[int, list[int]]:
        """As `LoopPasses.take_draft_token_ids`."""
        if self.textbook:
            assert self.waves.draft(lanes, self.passes) <= self.passes
            return {lane.index: lane.flight.unsettled(self.passes) for lane in lanes}
        pieces = passes // 2, passes - passes // 2
        assert all(self.waves.burst(lanes, piece, self.awaited) <= piece for piece in pieces)
        return {lane.index: lane.flight.settled(self.passes) for lane in lanes}

    def check_counts(self) -> None:
        """What was counted, and summed up over the reports, is what happened."""
        self.sums.add(self.waves.report())
        counts, machine, loops = self.sums, self.machine, range(1, self.text.loops + 1)
        assert (counts.passes, counts.rows) == (machine.passes, machine.rows)
        if not counts.judged:  # nothing ran ahead, so the sums have no lists
            assert not any(machine.judged[loop] for loop in loops)
            return
        for guesses, hits, looked in zip(counts.guesses, counts.hits, counts.looked, strict=True):
            assert hits <= guesses and max(hits, looked) <= counts.finished
        assert counts.judged == [machine.judged[loop] for loop in loops]
        assert counts.agreed == [machine.agreed[loop] for loop in loops]
        assert counts.settled == [machine.settled[loop] for loop in loops]

    def forget_all(self) -> None:
        for name in list(self.waves.flights):
            self.waves.forget(name)


class Storm:
    """Requests come, wait, lose their blocks and go; the pace changes; passes fail. All decided by `dice`.

    calm: no row is lost or contradicted from outside, so that passes can be held against what they should cost.
    """

    def __init__(
        self, dice: random.Random, loops: int, passes: int, textbook: bool = False, calm: bool = False
    ) -> None:
        self.dice, self.loops, self.passes, self.calm = dice, loops, passes, calm
        agreement, leaving = dice.choice([0.0, 0.3, 0.7, 0.95, 1.0]), dice.choice([0.1, 0.4, 0.8, 1.0])
        text = Text(loops, dice.choice([2, 3, 7, 20]), agreement, dice.randrange(1000), leaving)
        self.names = "abcd"[: dice.randint(1, 4)]
        self.engine = Engine(text, passes, len(self.names), textbook, tight=self.chance(0.4))
        self.live: dict[str, Request] = {}
        self.entry, self.roots = dice.randint(0, loops), 0

    def chance(self, share: float) -> bool:
        """True so often. Hypothesis shrinks towards False."""
        return self.dice.random() > 1 - share

    def token(self) -> int:
        return self.dice.randrange(self.engine.text.words)

    def run(self, steps: int) -> None:
        lost: list[str] = []
        for _ in range(steps):
            works: list[Work] = []
            for request in self.dice.sample(list(self.live.values()), len(self.live)):
                if self.chance(0.1):
                    continue  # merely not scheduled: its rows stay
                if not self.calm and self.chance(0.05):
                    self.preempt(request)
                    lost.append(request.name)
                else:
                    works.append(self.work(request))
            for name in self.names:
                if name not in self.live and self.chance(0.6):
                    self.live[name] = self.arrival(name, works)
                    works.insert(self.dice.randint(0, len(works)), self.work(self.live[name]))
                    lost.append(name)
            if self.chance(0.2):
                self.entry = self.dice.randint(0, self.loops) * self.dice.randint(0, 1)
            self.engine.bare, self.engine.apart = self.chance(0.2), self.chance(0.2)
            self.engine.awaited = self.chance(0.3)
            self.engine.deaf = not self.calm and self.chance(0.05)
            if not self.calm and self.chance(0.04):
                self.engine.machine.fuse = self.dice.randint(0, self.loops + self.passes)
            self.engine.step(works, self.entry, self.dice.randint(0, self.passes), lost)
            if self.calm:
                self.check_passes()
            elif self.chance(0.5):
                self.engine.sums.add(self.engine.waves.report())
            lost = [name for name, request in self.live.items() if request.finished]
            for name in lost:  # vLLM gives the blocks back at once and tells the runner with the next step
                self.engine.memory.shrink(self.live.pop(name).table, 0)
        self.engine.forget_all()
        self.engine.machine.check_slots()
        if not self.engine.textbook:
            self.engine.check_counts()

    def arrival(self, name: str, works: list[Work]) -> Request:
        """A new request; some continue another's text and share its blocks, even those of this very step."""
        tokens = [self.token() for _ in range(self.dice.randint(1, 10))]
        stops, speculates = frozenset([STOP] if self.chance(0.4) else []), not self.chance(0.15)
        loops = self.dice.randint(1, self.loops) if self.chance(0.3) else self.loops
        longest, gated = self.dice.randint(1, 30), loops > 1 and self.chance(0.4)
        request = Request(name, tokens, longest, loops, stops=stops, speculates=speculates, gated=gated)
        if works and self.chance(0.3):
            work = self.dice.choice(works)
            other, common = work.request, self.dice.randint(1, len(work.request.tokens))
            certain = min(common, other.computed + work.count, len(other.tokens), self.published(other))
            # Requests of another depth have other hashes.
            gated = gated and other.loops > 1
            tokens = other.tokens[:common] + tokens
            request = replace(request, tokens=tokens, root=other.root, loops=other.loops, gated=gated)
            request.table = self.engine.memory.share(other.table, certain)
            request.computed = len(request.table)
        else:
            self.roots += 1
            request.root = self.engine.text.after(0, -self.roots)
        if self.chance(0.3):
            request.draft = self.engine.text.plain(replace(request, stops=frozenset()))
            for _ in range(self.dice.randint(0, 3)):
                request.draft[self.dice.randrange(len(request.draft))] = self.token()
        return request

    def published(self, request: Request) -> int:
        """How many of its positions others may read."""
        return complete(request.loops, request.prompt, request.computed) if request.gated else len(request.tokens)

    def preempt(self, request: Request) -> None:
        """Its blocks go, save for some at the start that are found again when it resumes."""
        found = min(request.computed, self.published(request))
        kept = self.dice.randint(0, found) // BLOCK * BLOCK if self.chance(0.5) else 0
        self.engine.memory.shrink(request.table, kept)
        request.computed, request.drafts = kept, []

    def work(self, request: Request) -> Work:
        """What the scheduler might give it."""
        work = everything(request)
        if len(request.tokens) - request.computed > 1:
            if self.chance(0.5):
                work.count = self.dice.randint(1, work.count)
        else:
            if self.chance(0.15):
                work.drafts = work.drafts[: self.dice.randint(0, len(work.drafts))]
            elif not self.calm and self.chance(0.1):
                work.drafts, work.own = self.foreign(request), False
            work.count = 1 + len(work.drafts)
        if self.chance(0.3):
            work.ahead = self.dice.randint(0, self.loops + self.passes)
        self.engine.allocate(work)  # now, so that a request of the same step can share the blocks
        return work

    def foreign(self, request: Request) -> list[int]:
        """Drafts of which at least one is anybody's."""
        most = min(self.passes, request.prompt + request.longest - 1 - len(request.tokens))
        drafts = (request.drafts + [self.token() for _ in range(self.dice.randint(0, most))])[:most]
        if drafts:
            drafts[self.dice.randrange(len(drafts))] = self.token()
        return [STOP + 1 if token in request.stops else token for token in drafts]

    def check_passes(self) -> None:
        """At most R passes per token, as in plain decoding.

        In every pass the oldest row that is not done goes one loop deeper, and it is never dropped: the row before it,
        done, decided its token. So a token takes R passes at most, and to those of the answer come the tokens that are
        decided and not yet committed, and the loops that the row now under way has run (fewer than R). Of a finished
        request nothing is under way: its passes are R per token at most, without any constant.
        """
        for request in self.live.values():
            flight = self.engine.waves.flight(request.name, request.loops, request.gated)
            rows, undecided = flight.rows, [row for row in flight.rows if not flight.decided(row)]
            ready = rows.index(undecided[0]) if undecided else len(rows)
            under_way = undecided[0].depth if undecided else 0
            assert request.passes <= request.loops * (len(request.answer) + ready) + under_way
            assert not (request.finished and rows)


LOOPS, PASSES, DICE = st.integers(2, 16), st.integers(1, 20), st.randoms(use_true_random=False)


@settings(max_examples=60, deadline=None)
@given(loops=LOOPS, passes=PASSES, textbook=st.booleans(), dice=DICE)
def test_answers_are_those_of_plain_decoding_whatever_happens(loops, passes, textbook, dice):
    Storm(dice, loops, passes, textbook).run(15)


@pytest.mark.parametrize("seed", range(80))
def test_answers_are_those_of_plain_decoding_in_long_runs(seed):
    dice = random.Random(seed)
    Storm(dice, dice.randint(2, 16), dice.randint(1, 20), textbook=seed % 4 == 0).run(40)


@settings(max_examples=40, deadline=None)
@given(loops=LOOPS, passes=PASSES, dice=DICE)
def test_never_more_passes_than_plain_decoding(loops, passes, dice):
    Storm(dice, loops, passes, calm=True).run(15)


# One request that nothing disturbs: what it costs is known exactly.


def alone(text: Text, entry: int, passes: int, longest: int, textbook: bool = False) -> tuple[Engine, list[int]]:
    """Answers the prompt of the one token 1. Returns the engine, and how many drafts each step proposed."""
    engine, request, drafts = Engine(text, passes, textbook=textbook), Request("a", [1], longest, text.loops), []
    while not request.finished:
        engine.step([everything(request)], entry, passes)
        drafts.append(len(request.drafts))
    return engine, drafts


@st.composite
def settling(draw):
    """R, entry, and for each row of an answer the loop from which on its readouts are final."""
    loops = draw(LOOPS)
    return loops, draw(st.integers(1, loops)), draw(st.lists(st.integers(1, loops), min_size=1, max_size=25))


def shares(settle: Sequence[int], loops: int) -> list[float]:
    """How often each loop is in `settle`."""
    return [settle.count(loop) / len(settle) for loop in range(1, loops + 1)]


@settings(max_examples=60, deadline=None)
@given(drawn=settling(), passes=PASSES)
def test_passes_per_token(drawn, passes):
    """A row's successor enters for good when the row's readout is final and may be fed; the last row runs R loops."""
    loops, entry, settle = drawn
    engine, _ = alone(Settling(loops, settle), entry, passes, len(settle))
    assert engine.machine.passes == sum(max(entry, loop) for loop in settle[:-1]) + loops
    if settle[1:]:
        expected = passes_per_token(shares(settle[:-1], loops), entry) * (len(settle) - 1)
        assert engine.machine.passes - loops == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(dice=DICE, loops=LOOPS, entry=st.integers(1, 16), passes=PASSES)
def test_a_misprediction_costs_the_others_nothing(dice, loops, entry, passes):
    """Requests that are wrong at places of their own, in one batch: each takes the passes that it takes alone."""
    entry = min(entry, loops)
    settles = [[dice.randint(1, loops) for _ in range(dice.randint(1, 25))] for _ in range(dice.randint(2, 4))]
    text = Settling(loops, *settles)
    engine = Engine(text, passes, len(settles))
    requests = [
        Request("abcd"[number], [1], len(settle), loops, root=root)
        for number, (settle, root) in enumerate(zip(settles, text.roots, strict=True))
    ]
    while running := [request for request in requests if not request.finished]:
        engine.step([everything(request) for request in running], entry, passes)
    for request, settle in zip(requests, settles, strict=True):
        assert request.passes == sum(max(entry, loop) for loop in settle[:-1]) + loops


@settings(max_examples=60, deadline=None)
@given(drawn=settling(), passes=PASSES)
def test_rows_per_token(drawn, passes):
    """Exact where a wrong readout stays the same until it is put right, and all that follows from it is stable."""
    loops, entry, settle = drawn
    settle += [1] * loops  # so that the end of the answer keeps no wrong row from entering
    engine, _ = alone(Settling(loops, settle), entry, passes, len(settle))
    assert engine.machine.rows == pytest.approx(rows_per_token(shares(settle, loops), entry) * len(settle))


@settings(max_examples=60, deadline=None)
@given(drawn=settling(), passes=PASSES)
def test_counts(drawn, passes):
    loops, entry, settle = drawn
    engine, _ = alone(Settling(loops, settle), entry, passes, len(settle))
    counts, machine = engine.waves.counts, engine.machine
    assert counts.lane_passes == machine.passes
    assert counts.finished == len(settle)
    assert counts.dropped == machine.entered - len(settle)
    # Behind the last row nothing enters that could have to leave.
    assert counts.restarts == sum(loop > entry for loop in settle[:-1])
    assert counts.settled == ([settle.count(loop) for loop in range(1, loops + 1)] if entry == 1 else [0] * loops)
    engine.check_counts()
    assert engine.waves.report().passes == 0


@settings(max_examples=60, deadline=None)
@given(loops=LOOPS, passes=PASSES, longest=st.integers(1, 30), agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_textbook_costs_its_drafts_and_one_verification(loops, passes, longest, agreement):
    engine, drafts = alone(Text(loops, 7, agreement, 3), 1, passes, longest, textbook=True)
    assert engine.machine.passes == sum(drafts) + loops * len(drafts)
    # The last of as many drafts as may be is not read; where the answer's length leaves fewer, the last row is.
    assert engine.machine.reads == sum(drafts) + sum(count < passes for count in drafts[:-1])
    assert max(drafts) <= passes
    if agreement == 1.0:  # the first step answers one token, the others as many as there are drafts and one
        assert len(drafts) == 1 + -(-(longest - 1) // (passes + 1))


def test_textbook_counts_no_agreement_at_loops_it_does_not_read():
    engine, _ = alone(Text(4, 7, 0.7, 3), 1, 3, 20, textbook=True)
    counts, machine = engine.waves.report(), engine.machine
    for loop, (judged, agreed) in enumerate(zip(counts.judged, counts.agreed, strict=True), 1):
        assert judged <= machine.judged[loop]
        assert agreed <= machine.agreed[loop]


def test_textbook_goes_on_behind_drafts_that_were_not_scheduled():
    """Rows stay where their drafts were left out; what enters behind them keeps to the limits (see `standing`)."""
    engine, request = Engine(Text(2, 7, 1.0, 3), 10, textbook=True), Request("a", [1], 30, 2)
    engine.step([replace(everything(request), ahead=0)], 1, 10)
    assert len(request.drafts) == BLOCK - 2
    engine.step([Work(request, 1, [])], 1, 10)
    assert len(request.drafts) == 10
    while not request.finished:
        engine.step([everything(request)], 1, 10)


# Parts.


def flying(loops: int, *tokens: int) -> Flight:
    """A flight of rows from position 5 on, as deep as they are when one enters with each pass."""
    flight = Flight(loops)
    for number, token in enumerate(tokens):
        flight.board(number, 5 + number, token).depth = max(loops - number, 1)
    return flight


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 12))
def test_matching_is_the_common_start_at_the_same_position(rows, tokens, position):
    flight, same = flying(4, *rows), 0
    while position == 5 and same < min(len(rows), len(tokens)) and rows[same] == tokens[same]:
        same += 1
    assert flight.matching(position, tokens) == same


@given(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 12), st.integers(0, 2))
def test_restart_keeps_the_rows_from_the_newest_token_on(rows, position, token):
    flight = flying(4, *rows)
    flight.waiting, flight.held = (99, 9), len(rows)
    left, index = flight.restart(position, token), position - 5
    agrees = 0 <= index < len(rows) and rows[index] == token
    kept = list(range(len(rows)))[index:] if agrees else []
    assert [row.slot for row in flight.rows] == kept
    assert sorted(left + kept) == list(range(len(rows)))
    assert (flight.waiting, flight.held) == (None if agrees else (position, token), 0)


@pytest.mark.parametrize(
    ("tokens", "kept", "waiting"),
    [
        ([1], 4, None),
        ([1, 2, 3], 4, None),
        ([1, 2, 9], 2, (7, 9)),
        ([1, 2, 3, 4, 9], 4, (9, 9)),
        ([1, 9, 3], 0, (7, 3)),
        ([9], 0, (5, 9)),
        ([1, 2, 3, 4, 5, 6], 0, (10, 6)),
    ],
)
def test_claim_keeps_what_agrees_up_to_the_last_token(tokens, kept, waiting):
    """Behind a gap rows would not be consecutive: then all is computed afresh, but for the last token in lockstep."""
    waves = Waves(4, 4, 1, Machine(Text(4, 7, 1.0, 3), Memory(4)))
    flight = waves.flights["a"] = flying(4, 1, 2, 3, 4)
    waves.free = waves.free[4:]
    assert waves.claim(flight, 5, tokens) == flight.held == (1 if waiting and not kept else len(tokens))
    assert [row.token for row in flight.rows] == [1, 2, 3, 4][:kept]
    assert flight.waiting == waiting
    assert sorted(waves.free + [row.slot for row in flight.rows]) == list(range(slots_needed(4, 4, 1)))


@given(tokens=st.lists(st.integers(0, 2), max_size=60), cut=st.integers(0, 60))
def test_a_lookup_finds_what_followed_the_longest_run_last(tokens, cut):
    lookup = Lookup()
    lookup.extend(tokens[:cut])
    lookup.extend(tokens[cut:])
    expected = None
    for length in range(SHORTEST, LONGEST + 1):
        for place in range(length, len(tokens)):
            if len(tokens) >= length and tokens[place - length : place] == tokens[-length:]:
                expected = tokens[place]
    assert lookup.guess(tokens) == expected


def test_of_a_long_prompt_the_end_is_looked_up_in():
    lookup = Lookup()
    lookup.extend(range(MOST_LEARNED + 100))
    assert lookup.guess([97, 98]) is None and lookup.guess([198, 199]) == 200
    assert len(lookup.tokens) == MOST_LEARNED + 100  # positions stay what they are
    lookup.extend([7, 8, 97, 98, 5])
    assert lookup.guess([97, 98]) == 5


def test_guesses_enter_together_and_the_readout_takes_out_the_wrong_ones():
    """Text of one word over and over, which a lookup guesses right: several rows enter per pass."""
    text = Text(4, 1, 1.0, 1)
    engine, request = Engine(text, 8), Request("a", [0, 0, 0, 0], 40, 4)
    while not request.finished:
        engine.step([everything(request)], 0, 8)
    counts = engine.waves.report()
    assert sum(counts.hits) > 20 and counts.dropped == 0
    assert request.passes < 40 * 0.75  # 1 per token is what readouts alone could reach


@pytest.mark.parametrize("entry", range(5))
def test_a_right_draft_is_verified_several_tokens_per_pass(entry):
    text = Text(4, 20, 1.0, 5)  # early readouts do not contradict it
    engine, request = Engine(text, 12), Request("a", [1], 60, 4)
    request.draft = text.plain(request)
    while not request.finished:
        engine.step([everything(request)], entry, 12)
    apart, again = Engine(text, 12), Request("a", [1], 60, 4)
    while not again.finished:
        apart.step([everything(again)], entry, 12)
    assert request.answer == again.answer
    assert request.passes < 0.6 * again.passes
    assert not any(engine.waves.counts.guesses) or entry == 0  # drafts are not counted as lookups


@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=20), dice=DICE)
def test_a_draft_is_followed_until_it_was_wrong(tokens, dice):
    start, known = dice.randint(1, len(tokens) - 1), dice.randint(1, len(tokens))
    draft = [token if dice.random() < 0.8 else 9 for token in tokens[start:]] + [7]
    lookup, flight = Lookup(draft, start), Flight(4)
    lookup.extend(tokens[:known])
    for position in range(dice.randint(0, known), len(tokens)):
        flight.board(position, position, tokens[position])
    if flight.rows:
        right = draft[: len(tokens) - start] == tokens[start:]
        assert lookup.follow(flight.rows) == (draft[len(tokens) - start] if right else None)


def test_boarding_waits_for_entry_and_a_readout():
    flight = flying(4, 1, 2)
    flight.end = 9
    assert flight.boarding(1) is None  # not read yet
    flight.rows[1].heard, flight.rows[1].depth = [8, 3], 2
    assert flight.boarding(2) == (7, 3)
    assert flight.boarding(3) is None
    flight.waiting = (5, 1)
    assert flight.boarding(3) == (5, 1)


def test_settled_are_the_tokens_decided_whose_rows_lack_one_loop_at_most():
    flight = flying(4, 1, 2, 3, 4)
    assert flight.settled(9) == [2]
    flight.rows[1].depth, flight.rows[2].depth = 4, 3
    assert flight.settled(9) == [2, 3]
    assert flight.settled(1) == [2]
    assert flight.unsettled(9) == [2, 3, 4]


def test_committed_rows_under_the_gate_trail_until_their_last_loop():
    flight = Flight(3, gated=True)
    for slot, depth in enumerate((3, 2, 1, 1)):
        row = flight.board(slot, 5 + slot, slot)
        row.depth = depth
    flight.held = 3
    assert flight.restart(8, 3) == [0]  # done: it leaves at once
    assert [row.position for row in flight.trail] == [6, 7]
    assert [row.position for row in flight.rows] == [8]
    flight.trail[0].depth = 3
    assert flight.sweep() == [1]
    assert flight.ground() == [3]
    assert [row.position for row in flight.trail] == [7]
    assert flight.clear() == [2]


def test_decided_rows_do_not_keep_a_burst_going():
    machine = Machine(Text(4, 7, 1.0, 3), Memory(4))
    waves, flight = Waves(4, 4, 1, machine), Flight(4, gated=True)
    flight.board(0, 5, 1).depth = 2
    flight.rows[0].exit, flight.rows[0].heard, flight.end = 1, [3], 6
    assert waves.burst([Lane(0, flight)], 4) == 0


class Constant:
    """A machine whose readouts are all the token 7."""

    def run(self, rows, read, chunks, loop):
        return [7] * len(read)


@pytest.mark.parametrize(
    ("depth", "end", "stops", "others", "awaited", "passes"),
    [
        (4, 6, [], 1, False, 0),
        (4, 9, [7], 3, False, 0),
        (4, 9, [7], 4, False, 5),
        (4, 9, [7], 4, True, 0),
        (3, 6, [], 1, False, 1),
        (3, 6, [], 4, True, 1),
        (4, 9, [], 1, False, 5),
        (4, 9, [], 1, True, 5),
    ],
)
def test_a_burst_ends_once_a_quarter_of_the_answers_are_there(depth, end, stops, others, awaited, passes):
    """Of one request, whose row has heard 7, beside others that have only begun. A single one if a place is awaited."""
    waves = Waves(4, 4, 5, Constant())
    flight, *rest = (waves.flight(name) for name in "abcde"[: 1 + others])
    flight.board(waves.free.pop(), 5, 1).depth = depth
    flight.rows[0].since, flight.rows[0].heard = 1, [7] * depth
    flight.end, flight.stops = end, frozenset(stops)
    for other in rest:
        other.end = 100
        waves.restart(other, 20, 3)
    assert waves.burst([Lane(index, one) for index, one in enumerate([flight, *rest])], 5, awaited) == passes


@pytest.mark.parametrize("awaited", [False, True])
def test_no_burst_before_somebody_has_the_place_of_who_ended(awaited):
    waves = Waves(4, 4, 3, Constant())
    lanes = [Lane(index, waves.flight(name)) for index, name in enumerate("abc")]
    for lane in lanes:
        lane.flight.end = 100
        waves.restart(lane.flight, 20, 3)
    assert waves.burst(lanes, 2, awaited) == 2  # nobody has ended
    waves.free += lanes[1].flight.ground()
    assert waves.burst(lanes, 2, awaited) == (0 if awaited else 2)


def test_held_rows_are_not_dropped_until_a_burst():
    flight = flying(4, 1, 2, 3, 4)
    for row in flight.rows:
        row.heard = [9]
    flight.held = 3
    assert [row.token for row in flight.review()] == [4]
    assert flight.review() == []
    Waves(4, 4, 1, Machine(Text(4, 7, 1.0, 3), Memory(4))).burst([Lane(0, flight)], 0)
    assert [row.token for row in flight.review()] == [2, 3]


def test_scheduling_logic_needs_neither_torch_nor_vllm():
    script = """
import sys
import ouro_vllm.wavefront.flight, ouro_vllm.wavefront.pacing, ouro_vllm.wavefront.waves
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "vllm", "ouro_vllm"}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['ouro_vllm']"


# Draws.


def test_keys_are_splitmix64():
    """A seed and its positions are a stream of SplitMix64; of state 0 the published outputs are known."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [key(0, position) for position in range(4)] == [number >> 1 for number in published]


def test_neighbours_have_distinct_keys():
    """A stream per seed that was another's, some positions on, would show here."""
    keys = {key(seed, position) for seed in range(-50, 50) for position in range(300)}
    assert len(keys) == 100 * 300


SEED = st.integers(-(2**63), 2**63 - 1)


@given(st.sets(st.tuples(SEED, st.integers(0, 2**20)), min_size=2))
def test_keys_are_distinct_and_have_63_bits(pairs):
    keys = {key(*pair) for pair in pairs}
    assert len(keys) == len(pairs)
    assert all(0 <= number < 2**63 for number in keys)
