"""One request's positions under way: what enters, what is dropped, what is settled.

Pure Python. Words as in arXiv 2609.23033 and 2609.17184: a row is one position of the request; every pass runs each row
of the flight one loop deeper, so that a row enters at the back while the oldest reaches the last loop. A readout is the
token that a row's hidden state proposes for the next position.

What keeps this exact. A row at position i reads, at loop r, keys and values that positions before i wrote at loop r.
Rows of a flight stand at consecutive positions, and of two neighbours the older is at least one loop further (or both
run the same loop in the same pass, each layer writing before it reads). So whatever a row reads was written in an
earlier pass or in this one, by the token that stands there now: when a token is replaced, it and all after it leave the
flight, and their successors write anew before anything reads.

Under the exit gate a row is decided at the loop where the gate lets it go, and its token may be committed there; its
deeper loops are still run, because later positions read what they write. Committed rows with loops to run leave the
front of the flight for its trail, which goes along one loop in every pass that the flight's rows are in, and thereby
stays ahead of them. A trail is shorter than the flight has loops: its newest row has run one, the one before two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

NOTHING: frozenset[int] = frozenset()


@dataclass(slots=True)
class Row:
    """One position under way.

    position: 0-based place in the sequence.
    token: the token that stands there.
    slot: where its hidden state is kept between passes.
    depth: loops it has run.
    since: the loop (1-based) of the first readout that was taken, 0 before.
    heard: its readouts, one per loop from that one on.
    said: (probability, the exit gate's lambda) of each readout, where somebody asked for them.
    memo: what the machine wants to remember as long as the row is there.
    guessed: its token came from a lookup, not from a readout: its place among those of one pass, from 1 on, or 0.
    exit: the loop whose readout the gate let decide, 0 before and without a gate; set by the machine.
    staying: chance, by the gate, of not having left yet.
    """

    position: int
    token: int
    slot: int
    depth: int = 0
    since: int = 0
    heard: list[int] = field(default_factory=list)
    said: list[tuple[float, float]] = field(default_factory=list)
    memo: object = None
    guessed: int = 0
    exit: int = 0
    staying: float = 1.0


def complete(loops: int, prompt: int, computed: int) -> int:
    """How many positions of a request under the gate have surely run all loops once the step now scheduled is over.

    prompt: its tokens; computed: positions that were committed before the step. Prompts run all loops in the step that
    ends them, but for the last token, which is read and let go like others.
    """
    return max(prompt - 1, computed - loops + 1)


class Flight:
    """The rows of one request, oldest first, at consecutive positions; none is deeper than the one before it.

    Attributes:
        loops: of this request, which may be fewer or more than others run.
        gated: the exit gate decides, before the last loop if it can.
        rows: what is under way and not committed, but for the oldest, which stands on the newest committed token.
        trail: committed rows before those, still running their last loops.
        missing: first position whose last loops were lost, None if there is none; it may not be committed yet.
        waiting: (position, token) that will enter next and needs no readout; None once it has entered.
        end: positions from here on are not entered (allocated slots, length of the answer, length of the context).
        stops: tokens that end the answer; nothing enters behind one.
        held: leading rows that somebody waits for; they are not dropped, whatever is read.
    """

    def __init__(self, loops: int, gated: bool = False) -> None:
        self.loops, self.gated = loops, gated
        self.rows: list[Row] = []
        self.trail: list[Row] = []
        self.missing: int | None = None
        self.waiting: tuple[int, int] | None = None
        self.end = 0
        self.stops: frozenset[int] = NOTHING
        self.held = 0

    def decided(self, row: Row) -> bool:
        """Whether the row's readout is final."""
        return row.exit > 0 or row.depth == self.loops

    @property
    def pending(self) -> bool:
        """Whether somebody waits for a row that is not decided."""
        return self.waiting is not None or not all(map(self.decided, self.rows[: self.held]))

    @property
    def done(self) -> bool:
        """Whether all that may enter has, and is decided: the answer is there, or its room is used up."""
        if self.waiting is not None or not self.rows or not all(map(self.decided, self.rows)):
            return False
        newest = self.rows[-1]
        return newest.position + 1 >= self.end or (bool(newest.heard) and newest.heard[-1] in self.stops)

    @property
    def over(self) -> bool:
        """Whether nothing is under way or waits, as behind the end of an answer."""
        return self.waiting is None and not self.rows

    def restart(self, position: int, token: int) -> list[int]:
        """The request's newest token stands at `position`: keep the rows from there on if they agree with it.

        Returns the slots of the rows that leave.
        """
        self.waiting, self.held = None, 0
        first = self.rows[0].position if self.rows else position
        here = position - first
        if 0 <= here < len(self.rows) and self.rows[here].token == token:
            left, self.rows = self.rows[:here], self.rows[here:]
        else:
            left, self.rows, self.waiting = self.rows, [], (position, token)
        done = []
        for row in left:
            if self.gated and row.position < position and row.depth < self.loops:
                self.trail.append(row)
            else:
                done.append(row.slot)
        return done

    def ground(self) -> list[int]:
        """Whatever is not committed leaves, and nothing waits. Returns the slots."""
        left, self.rows, self.waiting, self.held = self.rows, [], None, 0
        return [row.slot for row in left]

    def clear(self) -> list[int]:
        """Everything leaves. Returns the slots."""
        left, self.trail = self.trail, []
        return [row.slot for row in left] + self.ground()

    def sweep(self) -> list[int]:
        """Rows of the trail that have run all loops leave. Returns the slots."""
        done = [row.slot for row in self.trail if row.depth == self.loops]
        self.trail = [row for row in self.trail if row.depth < self.loops]
        return done

    def matching(self, position: int, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from `position` on, stand in the oldest rows just so."""
        if self.rows and self.rows[0].position != position:
            return 0
        count = 0
        for row, token in zip(self.rows, tokens, strict=False):
            if row.token != token:
                break
            count += 1
        return count

    def keep(self, count: int) -> list[int]:
        """Only the `count` oldest rows stay. Returns the slots of those that leave."""
        left, self.rows = self.rows[count:], self.rows[:count]
        return [row.slot for row in left]

    def boarding(self, entry: int) -> tuple[int, int] | None:
        """(position, token) that enters with the next pass, None if none does.

        entry: loops that a row must have run before its readout is worth feeding; 0 counts as 1 here.
        """
        if self.waiting is not None:
            return self.waiting
        if not self.rows:
            return None
        newest = self.rows[-1]
        early = newest.depth < entry and not self.decided(newest)
        if early or not newest.heard or newest.position + 1 >= self.end:
            return None
        token = newest.heard[-1]
        return None if token in self.stops else (newest.position + 1, token)

    def board(self, slot: int, position: int, token: int) -> Row:
        """Enter what `boarding` named."""
        row = Row(position, token, slot)
        self.rows.append(row)
        self.waiting = None
        return row

    def tail(self, length: int) -> list[int]:
        """The newest tokens under way, at most `length`."""
        return [row.token for row in self.rows[-length:]]

    def review(self) -> list[Row]:
        """After a pass: where a row now proposes another token than its follower is, the followers leave.

        Returns the rows that leave.
        """
        for index in range(max(self.held - 1, 0), len(self.rows) - 1):
            heard = self.rows[index].heard
            if heard and heard[-1] != self.rows[index + 1].token:
                left, self.rows = self.rows[index + 1 :], self.rows[: index + 1]
                return left
        return []

    def settled(self, most: int) -> list[int]:
        """Tokens behind the oldest that are decided and whose own row is, too, or lacks one loop at most.

        Their rows cost the next forward one pass or none. At most `most` of them.
        """
        tokens = []
        for older, row in zip(self.rows, self.rows[1 : most + 1], strict=False):
            if not self.decided(older) or not (row.exit or row.depth >= self.loops - 1):
                break
            tokens.append(row.token)
        return tokens

    def unsettled(self, most: int) -> list[int]:
        """All tokens behind the oldest, decided or not: the drafts of textbook draft-then-verify."""
        return [row.token for row in self.rows[1 : most + 1]]
