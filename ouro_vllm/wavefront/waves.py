"""Passes over all requests of a batch: which rows run, in which order, and what is counted.

Pure Python; tensors are behind `Machine`. A batch's requests share every pass, each at its own pace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Protocol

from ouro_vllm.wavefront.flight import Flight, Row
from ouro_vllm.wavefront.lookup import LONGEST, Lookup

GUESSES = 3  # most rows per request that enter on a lookup in one pass


@dataclass(slots=True)
class Lane:
    """A request's place in the batch of this step.

    index: its row in the batch's block tables.
    flight: its rows under way.
    speculates: False where only the tokens vLLM scheduled may run.
    entry: loops before a readout is fed (see `Flight.boarding`); 0 feeds lookups too, before there is a readout.
    lookup: what has been committed, if entry may be 0, or a draft to be followed.
    traced: whether rows are read at every loop, however late readouts are fed.
    waits: True where nothing may follow in `Waves.forward`, only in a burst.
    guesses: rows that may enter on a lookup in one pass, GUESSES at most.
    """

    index: int
    flight: Flight
    speculates: bool = True
    entry: int = 1
    lookup: Lookup | None = None
    traced: bool = False
    waits: bool = False
    guesses: int = GUESSES


@dataclass(slots=True)
class Chunk:
    """Positions of one request that run all loops in lockstep: prompts, recomputation, what matches nothing kept.

    index: the request's row in the batch's block tables; start: first position; tokens: how many.
    where: offset of the first scheduled one among the step's scheduled tokens.
    loops: that the request runs.
    lead: how many at the start are not scheduled but recomputed, because their last loops were lost.
    """

    index: int
    start: int
    tokens: int
    where: int
    loops: int
    lead: int = 0


class Machine(Protocol):
    """What runs a pass."""

    def run(
        self, rows: Sequence[tuple[int, Row]], read: Sequence[int], chunks: Sequence[Chunk], loop: int
    ) -> list[int]:
        """One pass: each (lane index, row) runs loop row.depth + 1, the chunks run `loop`.

        Returns the readouts, as tokens, of the rows numbered in `read`. Where the gate of a row's request lets it go
        after this loop, sets the row's `exit` to it, and keeps the hidden state that was read.
        """


@dataclass
class Counts:
    """What happened since the last report. All are plain sums."""

    passes: int = 0  # that had rows of flights in them, or ran bare
    lane_passes: int = 0  # the same, counted once per request that had rows in the pass
    rows: int = 0
    dropped: int = 0  # rows that left because a deeper readout disagreed with their token
    restarts: int = 0  # times that followers left because a deeper readout disagreed
    finished: int = 0  # rows that were decided: by their last loop, or by the gate before it
    # By place among the guesses of one pass, from the first:
    guesses: list[int] = field(default_factory=list)  # rows that entered on a lookup
    hits: list[int] = field(default_factory=list)  # of the finished: entered on a lookup
    looked: list[int] = field(default_factory=list)  # finished, all of them, where so many guesses could enter
    agreed: list[int] = field(default_factory=list)  # of the finished: readout at loop r + 1 was the one that decided
    judged: list[int] = field(default_factory=list)  # of the finished: there was a readout at loop r + 1
    settled: list[int] = field(default_factory=list)  # of the finished and read at every loop: settled by loop r + 1
    seconds: float = 0.0  # in passes
    shapes: list[tuple[int, float]] = field(default_factory=list)  # (rows, seconds) of passes without chunks

    @property
    def drafted(self) -> bool:
        """Whether anything ran ahead. Otherwise all but passes, rows and seconds are zero."""
        return self.finished > 0 or self.dropped > 0 or any(self.guesses)

    def add(self, other: "Counts") -> None:
        """Take in another's sums; its single passes (`shapes`) are not kept."""
        self.passes += other.passes
        self.lane_passes += other.lane_passes
        self.rows += other.rows
        self.seconds += other.seconds
        if not other.drafted:
            return
        self.dropped += other.dropped
        self.restarts += other.restarts
        self.finished += other.finished
        for name in ("agreed", "judged", "settled", "guesses", "hits", "looked"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine += [0] * (len(theirs) - len(mine))
            for loop, count in enumerate(theirs):
                mine[loop] += count


def slots_needed(loops: int, passes: int, requests: int) -> int:
    """Hidden states to be kept: `Waves.most` rows per request, or more."""
    return requests * (passes + loops)


def must_fit(scheduled: int, loops: int, requests: int) -> int:
    """Rows that a pass must have room for, where a step schedules so many tokens.

    Beside those, each request may have R that cannot be left out: up to R - 1 of its trail, or lost with it, and in a
    burst that of its newest token.
    """
    return scheduled + requests * loops


class Waves:
    """Flights of all requests and the passes that carry them."""

    def __init__(
        self,
        loops: int,
        passes: int,
        requests: int,
        machine: Machine,
        window: int | None = None,
        limit: float = inf,
    ) -> None:
        """loops: R. passes: most per burst. requests: most that are under way at once.

        window: positions of which a row reads its own loop, itself among them, if older ones are shared. What is shared
        must be final, so that no more rows are under way than these.
        limit: rows that fit in a pass, tokens of chunks among them; at least `must_fit` of what a step schedules.
        """
        self.loops, self.machine = loops, machine
        self.limit, self.reserve = limit, requests * loops  # places in a pass that rows of mere use leave to others
        self.most = passes + loops  # rows per flight: what a burst can settle, and what is in flight around it
        if window is not None:
            self.most = min(self.most, window)
        self.flights: dict[str, Flight] = {}
        self.slots = slots_needed(loops, passes, requests)
        self.free = list(range(self.slots))
        self.counts = self._fresh()
        self.guessing = 0  # guesses that could enter in the latest pass

    def _fresh(self) -> Counts:
        guesses, hits, looked = [0] * GUESSES, [0] * GUESSES, [0] * GUESSES
        agreed, judged, settled = [0] * self.loops, [0] * self.loops, [0] * self.loops
        return Counts(guesses=guesses, hits=hits, looked=looked, agreed=agreed, judged=judged, settled=settled)

    def report(self) -> Counts:
        """What was counted since the last call."""
        counts, self.counts = self.counts, self._fresh()
        return counts

    def flight(self, request: str, loops: int = 0, gated: bool = False) -> Flight:
        """The request's flight, a new one if it has none: of `loops` loops, 0 for R, with or without the gate."""
        if request not in self.flights:
            self.flights[request] = Flight(loops or self.loops, gated)
        return self.flights[request]

    def forget(self, request: str) -> None:
        """The request is gone, or its blocks are."""
        flight = self.flights.pop(request, None)
        if flight:
            self.free += flight.clear()

    def lose(self) -> None:
        """A pass failed: nothing under way can be relied on. vLLM schedules anew what is not committed; of what is,
        each flight remembers from where on last loops are missing."""
        for request, flight in list(self.flights.items()):
            missing = flight.missing
            if missing is None and flight.gated:  # what left early may be committed and not in the trail yet
                short = (row.position for row in flight.trail + flight.rows if row.depth < flight.loops)
                missing = next(short, None)
            self.free += flight.clear()
            flight.missing = missing
            if missing is None:
                del self.flights[request]

    def restart(self, flight: Flight, position: int, token: int) -> None:
        """The request's newest committed token."""
        self.free += flight.restart(position, token)

    def claim(self, flight: Flight, position: int, tokens: Sequence[int]) -> int:
        """vLLM scheduled `tokens` from `position` on. Hold the rows that are these, let go of what contradicts them.

        Returns how many of the tokens have rows; the last one always has, entering with the next pass if need be.
        """
        kept = flight.matching(position, tokens)
        if kept < len(tokens) - 1:
            kept = 0  # rows behind a gap would not be consecutive: compute all of it afresh
        if kept < len(tokens):
            self.free += flight.keep(kept)
            flight.waiting = (position + len(tokens) - 1, tokens[-1])
            kept += 1
        flight.held = kept
        return kept

    def forward(self, lanes: Sequence[Lane], chunks: Sequence[Chunk], follow: bool = True, apart: bool = False) -> int:
        """Bring every held row to where it is decided, and the chunks through all their loops. Returns the passes.

        Rows behind the held ones come along, and new ones enter, if `follow`. apart: those behind sit out, and nothing
        is read out but for the gate. chunks: deepest first.
        """
        deepest, loop = max((chunk.loops for chunk in chunks), default=0), 0
        while loop < deepest or any(lane.flight.pending for lane in lanes):
            loop += 1
            self._one(lanes, [chunk for chunk in chunks if chunk.loops >= loop], loop, follow, apart)
        for lane in lanes:
            lane.flight.missing = None
        return loop

    def burst(self, lanes: Sequence[Lane], passes: int, awaited: bool = False) -> int:
        """Up to `passes` passes with no one waiting. Returns how many had anything to do.

        They end early once the answers of a quarter of the lanes are there: those should not wait. For fewer, in large
        batches somebody nearly always, another step would cost more than they lose.
        awaited: somebody waits for a place. They end once a single answer is there, so that prompts do not come in
        crowds, and there is none where a lane's request has ended.
        """
        if awaited and any(lane.flight.over for lane in lanes):
            return 0
        enough = 1 if awaited else len(lanes) / 4
        for lane in lanes:
            lane.flight.held, lane.waits = 0, False
        for number in range(passes):
            done = sum(lane.flight.done for lane in lanes)
            if done >= enough or not self._one(lanes, (), 0, follow=True):
                return number
        return passes

    def count_plain(self, loops: Sequence[int]) -> None:
        """A step of chunks alone decided one token each of requests that run so many loops."""
        self.counts.passes += max(loops, default=0)
        self.counts.lane_passes += sum(loops)
        self.counts.rows += sum(loops)

    def draft(self, lanes: Sequence[Lane], drafts: int) -> int:
        """Textbook drafting: the newest row alone runs one loop, its readout enters, `drafts` times at most.

        Returns the passes.
        """
        for number in range(drafts + 1):
            rows = []
            for lane in lanes:
                flight = lane.flight
                if len(flight.rows) <= drafts and (boarding := flight.boarding(1)):
                    rows.append((lane, flight.board(self.free.pop(), *boarding)))
            # The last draft needs no readout of its own: it is only fed when it is verified.
            if not rows or number == drafts:
                return number
            self._run(rows, list(range(len(rows))), (), 0)
        return drafts

    def _one(
        self, lanes: Sequence[Lane], chunks: Sequence[Chunk], loop: int, follow: bool, apart: bool = False
    ) -> bool:
        """One pass of everything that has loops to run. Returns whether there was anything."""
        rows: list[tuple[Lane, Row]] = []
        read: list[int] = []
        busy, self.guessing = bool(chunks), 0
        taken = self.slots - len(self.free) + sum(chunk.tokens for chunk in chunks)
        # What nobody waits for enters while there is room, and sits out where not even all that is under way fits.
        room = self.limit - self.reserve - taken
        crowded = apart or taken + sum(lane.flight.waiting is not None for lane in lanes) > self.limit
        for lane in lanes:
            flight = lane.flight
            early = lane.speculates and follow and not apart  # whether early readouts are of use
            speculates = early and not lane.waits
            entry = min(lane.entry, flight.loops)
            if flight.waiting is not None or speculates:
                boarding = flight.boarding(entry)
                under_way = len(flight.trail) + len(flight.rows)
                if boarding and (flight.waiting is not None or (under_way < self.most and room > 0)):
                    room -= flight.waiting is None
                    flight.board(self.free.pop(), *boarding)
            # Not under the gate: rows that enter together could all be committed at loop 1, and trail without bound.
            if speculates and lane.lookup is not None and not flight.gated:
                by_text = lane.guesses if entry == 0 and room > 0 else 0
                self.guessing = max(self.guessing, by_text)
                room -= self._guess(flight, lane.lookup, by_text, room)
            rows += [(lane, row) for row in flight.trail]
            last = len(flight.rows) - 1
            for index, row in enumerate(flight.rows[: flight.held] if crowded else flight.rows):
                if row.depth == flight.loops:
                    continue
                busy = busy or not row.exit
                # A row once read is read until it is decided: what its loops said is then comparable.
                wanted = speculates and (index < last or row.depth + 1 >= entry or row.heard)
                wanted = wanted or (early and lane.traced)
                if not row.exit and (wanted or flight.gated):
                    read.append(len(rows))
                rows.append((lane, row))
        if not busy:  # rows that are decided are in no hurry: their last loops are run with those of others
            return False
        self._run(rows, read, chunks, loop)
        for lane in lanes:
            if lane.flight.trail:
                self.free += lane.flight.sweep()
            left = lane.flight.review()
            if left:
                self.counts.restarts += 1
                self.counts.dropped += len(left)
                self.free += [row.slot for row in left]
        return True

    def _guess(self, flight: Flight, lookup: Lookup, by_text: int, room: int) -> int:
        """Let guesses enter behind a row that enters itself, all to run the first loop in this pass. Returns how many.

        by_text: the first so many not only by what a draft says. room: for so many at most.
        """
        for place in range(1, GUESSES + 1):
            newest = flight.rows[-1] if flight.rows else None
            if newest is None or newest.depth or newest.position + 1 >= flight.end or len(flight.rows) >= self.most:
                return place - 1
            token = lookup.follow(flight.rows)
            guessed = token is None and place <= by_text
            if guessed:
                before = flight.rows[0].position
                known = lookup.tokens[max(0, before - LONGEST) : before]
                token = lookup.guess(known + flight.tail(LONGEST))
            if token is None or newest.token in flight.stops or token in flight.stops or place > room:
                return place - 1
            row = flight.board(self.free.pop(), newest.position + 1, token)
            if guessed:
                row.guessed = place
                self.counts.guesses[place - 1] += 1
        return GUESSES

    def _run(self, rows: Sequence[tuple[Lane, Row]], read: Sequence[int], chunks: Sequence[Chunk], loop: int) -> None:
        began = perf_counter()
        readouts = self.machine.run([(lane.index, row) for lane, row in rows], read, chunks, loop)
        seconds = perf_counter() - began
        self.counts.seconds += seconds
        if read and not chunks:  # a readout is what makes sure that the pass is over
            self.counts.shapes.append((len(rows), seconds))
        for number, token in zip(read, readouts, strict=True):
            row = rows[number][1]
            row.since = row.since or row.depth + 1
            row.heard.append(token)
        counts = self.counts
        if rows:
            counts.passes += 1
            counts.rows += len(rows)
            counts.lane_passes += len({lane.index for lane, _ in rows})
        for lane, row in rows:
            row.depth += 1
            if row.exit == row.depth or (not row.exit and row.depth == lane.flight.loops):
                self._finished(row)

    def _finished(self, row: Row) -> None:
        counts, heard = self.counts, row.heard
        counts.finished += 1
        for place in range(self.guessing):
            counts.looked[place] += 1
        if row.guessed:
            counts.hits[row.guessed - 1] += 1
        first = row.since - 1
        if first + len(heard) != row.depth:  # not read up to the last loop: textbook drafts
            return
        final = heard[-1]
        for offset, token in enumerate(heard):
            counts.judged[first + offset] += 1
            counts.agreed[first + offset] += token == final
        if first == 0:
            depth = row.depth - 1
            while depth and heard[depth - 1] == final:
                depth -= 1
            counts.settled[depth] += 1
