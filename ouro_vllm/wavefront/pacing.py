"""How eager the wavefront is, chosen from measured figures.

The choice is `entry`: how many loops a row must have run before its readout is fed. 1 commits most per pass of what
early loops draft and runs the most rows; 0 adds guesses from the request's own text (`lookup`), one per pass or more;
R feeds only decided tokens: plain decoding, with the passes of several tokens in one engine step.
Rows are nearly free while a pass is bound by reading weights and cost time in proportion once it is bound by computing,
so the best choice depends on the machine, the model and the batch.

Whether to draft at all is not reckoned but tried: what a step costs beside its passes differs, and plain steps are the
promise to be kept. Whichever of the two is not in use runs a few steps now and then, which are compared with those
right before and behind them, since machines drift. What gave tokens faster in the middle of the latest trials goes on,
drafting if it did by `MARGIN` at least. The first trials are not far apart: when all requests have just begun together,
steps have no prompts in them and drafting looks better than it will be where answers are short. Within a trial all
seconds count against all tokens: of drafting steps a few are far longer than most, those with prompts in them.
Pure Python.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import log
from statistics import median, median_high
from typing import NamedTuple

from ouro_vllm.wavefront.waves import GUESSES, Counts

LATEST = 31  # passes, or plain steps with prompts in them, that figures are taken over
TOKENS = 2000.0  # finished rows that the agreement is averaged over
PRIOR = 16.0  # weight, in rows, of the agreement assumed before any was seen
GUESSED = 0.4  # lookups per token assumed before any was made, fewer by place, half of them right
SAVED = 0.7  # passes that a right lookup saves: 0.72 on the bundled checkpoint with 1, 2, 3 or 5 per pass
GAIN = 0.03  # another entry must promise this much before it is chosen
LOOK = 64  # steps between looks at how another entry does
REST = 12, 64  # steps between trials while drafting, or plain steps, are in use: drafting ones are of many passes
MOST_TIMED = 256  # rows in the largest pass timed at the start
# Steps that a trial is to measure, and of what is in use before it and behind it. Drafting steps that somebody waits
# for give one token, those behind them many: three of them were too few to tell 5%.
LAPS = 6
FIRST = 4  # steps until the first trial
TRIALS = 8  # the latest, that say which of the two is faster
FEWEST = 3  # trials before anything else is taken up
NEXT = 4  # steps between trials until there were so many
CLEAR = 1.25  # what gives tokens so many times slower needs no more steps of its trial
MARGIN = 0.05  # drafting must gain this much: plain steps are the promise
# Of the time may be lost to trials. The second is the least: each trial that speaks for what is in use halves it.
SHARE = 0.005, 0.00125
DOUBT = 20  # times that share for trials of plain steps, until there were FEWEST: the gain they lose is not yet sure
LONGEST_REST = 600.0  # seconds of steps without a trial, at most: one of a large batch may lose several
PIECE = 0.01  # seconds of a burst, about, between looks at whether somebody came
LATER = 0.05  # share of the time to a first token that rows running ahead of others may add
BESIDE = 1e-3  # seconds, about, that a pass by itself takes beside the model: a plain step has all of them in one go


@dataclass(frozen=True)
class Pace:
    """What the scheduler decides and ships with its output, so that all ranks do the same.

    entry, guesses: see `Lane`. passes: of the burst after this step. plain: nothing is to run ahead, neither in it nor
    behind it. piece: passes of the burst at a time; behind each but the last the burst ends if somebody came.
    For somebody who waits for a first token, bare: the step itself is to run what is scheduled and nothing else, as in
    plain decoding; apart: rows that nobody waits for are to sit out in it.
    awaited: somebody waits for a place in the batch, see `Waves.burst`.
    """

    entry: int
    passes: int
    guesses: int = GUESSES
    plain: bool = False
    piece: int = 1
    bare: bool = False
    apart: bool = False
    awaited: bool = False

    @property
    def pieces(self) -> int:
        """Of the burst, at least one: without passes, too, what has been settled is asked for."""
        return max(1, -(-self.passes // self.piece))


class Batch(NamedTuple):
    """What the pace is to know of a step's requests.

    lanes: those that decode. hurry: someone waits for the next step: no burst before it. led: for one of them something
    is always to run ahead: no plain step. drawn: most tokens are sampled, not the likeliest. prompts, fresh: see `Lap`.
    alone: none of them is drafted for: no step but plain ones, whatever is fixed.
    """

    lanes: int
    hurry: bool = False
    led: bool = False
    drawn: bool = False
    prompts: int = 0
    fresh: int = 0
    alone: bool = False


@dataclass
class StepReport:
    """What a step reports back.

    committed: tokens that vLLM's sampler decided in it. in_flight: rows kept after it. plain: nothing ran ahead in it
    or in a burst after it.
    """

    counts: Counts
    committed: int
    in_flight: int = 0
    plain: bool = False

    def add(self, other: "StepReport") -> None:
        """Take in another's sums."""
        self.counts.add(other.counts)
        self.committed += other.committed
        self.in_flight = other.in_flight


def passes_per_token(settled: list[float], entry: int, hits: float = 0.0) -> float:
    """Of a long answer. settled: chance, per loop from the first, that a readout is final from there on.

    hits: share of tokens that a lookup guesses right; most save the pass before the readout, where entry is 0.
    """
    saved = SAVED * hits if entry == 0 else 0.0
    return sum(chance * max(entry, loop) for loop, chance in enumerate(settled, 1)) - saved


def rows_per_token(settled: list[float], entry: int, misses: float = 0.0) -> float:
    """Rows computed per token: R of use, and those that a wrong readout brought in before it was corrected.

    misses: lookups per token that guess wrong; each runs one loop before it is found out, where entry is 0.
    """
    wasted = misses if entry == 0 else 0.0
    entry = max(1, entry)
    for loop, chance in enumerate(settled, 1):
        wasted += chance * sum(1 + age // entry for age in range(loop - entry))
    return len(settled) + wasted


def bucket(rows: int) -> int:
    """Rows, rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on: passes that are told apart by what they cost."""
    size = 1 << max(0, rows - 1).bit_length()
    return size * 3 // 4 if size >= 4 and rows <= size * 3 // 4 else size


class PassCost:
    """Seconds that a pass of n rows takes: medians of the latest passes of about n rows, straight lines between.

    points: (rows, seconds), a new list whenever they are worked out anew: not with each pass, once there were many.
    """

    def __init__(self) -> None:
        self.latest: dict[int, deque[float]] = {}
        self.points: list[tuple[int, float]] = []
        self.passes = 0

    def learn(self, rows: int, seconds: float) -> None:
        """One pass."""
        latest = self.latest.setdefault(bucket(rows), deque(maxlen=LATEST))
        few, self.passes = len(latest) < LATEST, self.passes + 1
        latest.append(seconds)
        if few or self.passes % LATEST == 0:
            self.points = []

    def _fit(self) -> list[tuple[int, float]]:
        """(rows, seconds) by rising rows. More rows never take less time: what says so is noise, and is averaged."""
        pooled: list[list[float]] = []  # [rows of the last one pooled, their mean seconds, how many]
        for rows, seconds in sorted((rows, median(latest)) for rows, latest in self.latest.items()):
            pooled.append([rows, seconds, 1])
            while len(pooled) > 1 and pooled[-2][1] > pooled[-1][1]:
                (_, t0, n0), (rows1, t1, n1) = pooled[-2:]
                pooled[-2:] = [[rows1, (t0 * n0 + t1 * n1) / (n0 + n1), n0 + n1]]
        return [(int(rows), seconds) for rows, seconds, _ in pooled]

    def of(self, rows: float) -> float:
        """Seconds for `rows`; 0 while nothing is known. Beyond the largest pass seen time grows with the rows."""
        if not self.points:
            self.points = self._fit()
        if not self.points:
            return 0.0
        before = (0, self.points[0][1])
        for point in self.points:
            if rows <= point[0]:
                (n0, t0), (n1, t1) = before, point
                return t0 + (t1 - t0) * (rows - n0) / (n1 - n0)
            before = point
        return before[1] * rows / before[0]


@dataclass
class Lap:
    """A step on the clock. contest: that it counts in. plain: as the pace said.

    counts: it says what its kind costs: the step before was of its kind.
    prompts: tokens of prompts. fresh: requests that get their first token in it. seconds: until the next one began.
    committed: tokens.
    """

    began: float
    contest: "Contest"
    plain: bool
    counts: bool
    prompts: int
    fresh: int
    seconds: float = 0.0
    committed: int = 0


Laps = Sequence[tuple[float, int]]  # of steps: seconds, and tokens


def per_token(laps: Laps) -> float:
    """Seconds per token over all of them."""
    return sum(seconds for seconds, _ in laps) / sum(tokens for _, tokens in laps)


class Contest:
    """Plain steps against drafting, for batches of one kind.

    plain: what is in use, as long as no trial runs. laps: of (drafting, plain) steps the latest.
    scores: of the latest trials, the logarithm of drafting's seconds per token over those of plain steps.
    clock: seconds of all steps so far. On no other clock is what trials lose a share of the time: a server may wait.
    rest: no trial before this time.
    """

    def __init__(self, plain: bool, rest: float = 0.0) -> None:
        self.plain, self.trying = plain, False
        self.laps = tuple(deque[tuple[float, int]](maxlen=2 * LAPS) for _ in range(2))
        self.scores: deque[float] = deque(maxlen=TRIALS)
        self.left, self.rest = FIRST, rest  # steps, and a time, until the trial begins; or steps until it ends
        self.clock, self.began = 0.0, 0.0
        self.around: list[tuple[float, int]] = []  # of what is in use, right before the latest trial and behind it
        self.tried: list[tuple[float, int]] = []  # in that trial, until it is judged
        self.share = SHARE[0]

    def decide(self) -> bool:
        """Whether the next step is plain."""
        self.left -= 1
        if self.left <= 0:
            used = self.laps[self.plain]
            if self.trying:  # too many steps had prompts in them
                self._return()
            elif self.clock >= self.rest and len(used) >= LAPS:
                self.trying, self.tried = True, []
                self.around = list(used)[-LAPS:]
                self.began, self.left = self.clock, 4 * LAPS
        return self.plain != self.trying

    def lap(self, plain: bool, seconds: float, tokens: int) -> None:
        """A step took so many seconds, and committed so many tokens."""
        self.laps[plain].append((seconds, tokens))
        if self.trying and plain != self.plain:
            self.tried.append((seconds, tokens))
            clear = len(self.tried) > 1 and per_token(self.tried) > CLEAR * per_token(self.around)
            if clear or len(self.tried) == LAPS:
                self._return()
        elif not self.trying and self.tried and plain == self.plain:
            self.around.append((seconds, tokens))
            if len(self.around) == 2 * LAPS:
                self._judge()

    def _return(self) -> None:
        """The trial is over, and judged once as many steps ran behind it as before it. What it lost is not to be lost
        again soon."""
        slower = 1 - per_token(self.around) / per_token(self.tried) if self.tried else 1.0
        lost = slower * (self.clock - self.began)
        doubt = not self.plain and len(self.scores) + 1 < FEWEST
        self.rest = self.clock + min(lost / (DOUBT * self.share if doubt else self.share), LONGEST_REST)
        self.trying, self.left = False, 4 * LAPS
        if len(self.tried) == 1:  # says little
            self.tried = []

    def _judge(self) -> None:
        """One more score, and what is in use from now on."""
        tried, around = per_token(self.tried), per_token(self.around)
        self.scores.append(log(tried / around if self.plain else around / tried))
        self.share = max(SHARE[1], self.share / 2) if tried > around else SHARE[0]
        self.tried = []
        self.left = NEXT if len(self.scores) < TRIALS else REST[self.plain]
        if len(self.scores) >= FEWEST:
            self.plain = median_high(self.scores) > log(1 - MARGIN)


@dataclass
class Pacer:
    """Learns from reports and decides.

    loops: R. passes: most per burst. fixed: an entry to use always, None to choose. contested: whether plain steps are
    tried, if nothing is fixed. entry, most: what is chosen now (see `Lane.entry` and `Lane.guesses`). plain: whether
    steps are plain now.
    """

    loops: int
    passes: int
    fixed: int | None = None
    contested: bool = True
    cost: PassCost = field(default_factory=PassCost)

    def __post_init__(self) -> None:
        weights = [1.0 / (loop + 1) ** 2 for loop in range(self.loops)]
        self.settled = [PRIOR * weight / sum(weights) for weight in weights]
        # Lookups by their place in a pass, finished rows of which there are so many lookups, and right ones.
        self.looked = [PRIOR] * GUESSES
        self.guesses = [GUESSED * PRIOR / place for place in range(1, GUESSES + 1)]
        self.hits = [count / 2 for count in self.guesses]
        self.entry, self.most = 0 if self.fixed is None else self.fixed, GUESSES
        self.steps, self.plain, self.quiet = 0, False, Pace(self.loops, 0, plain=True)
        self.reckoned: tuple[int, list[tuple[int, float]]] | None = None  # lanes and pass costs of the latest choice
        self.contests: dict[tuple[int, bool], Contest] = {}
        self.lap: Lap | None = None
        self.last: Lap | None = None
        self.prompts: deque[tuple[float, int]] = deque(maxlen=LATEST)  # of plain steps: seconds for, and tokens of them
        self.abreast: deque[float] = deque(maxlen=LATEST)  # of drafting steps: rows per request in a pass
        self.apart = False  # whether rows sat out in the latest step

    def learn(self, report: StepReport) -> None:
        """Take in what one step measured."""
        counts = report.counts
        for rows, seconds in counts.shapes:
            self.cost.learn(rows, seconds)
        if not counts.drafted:
            return
        if counts.lane_passes and not self.apart:
            self.abreast.append(counts.rows / counts.lane_passes)
        for loop, count in enumerate(counts.settled):
            self.settled[loop] += count
        for place, looked in enumerate(counts.looked):
            self.looked[place] += looked
            self.guesses[place] += counts.guesses[place]
            self.hits[place] += counts.hits[place]
            if self.looked[place] > TOKENS:
                share = TOKENS / self.looked[place]
                for sums in (self.looked, self.guesses, self.hits):
                    sums[place] *= share
        total = sum(self.settled)
        if total > TOKENS:
            self.settled = [count * TOKENS / total for count in self.settled]

    def chances(self) -> list[float]:
        """Per loop from the first: how often a readout was final from that loop on."""
        total = sum(self.settled)
        return [count / total for count in self.settled]

    def seconds_per_token(self, entry: int, guesses: int, lanes: int) -> float:
        """Expected time per step in which each of `lanes` requests gets one token."""
        chances = self.chances()
        hits, made = (
            sum(count / looked for count, looked in zip(counts[:guesses], self.looked, strict=False))
            for counts in (self.hits, self.guesses)
        )
        passes = max(passes_per_token(chances, entry, hits), 1 / (1 + guesses))
        rows = rows_per_token(chances, entry, max(0.0, made - hits))
        return passes * self.cost.of(lanes * rows / passes)

    def _times(self, lanes: int) -> dict[tuple[int, int], float]:
        """`seconds_per_token` of every choice of (entry, guesses)."""
        ways = [(0, GUESSES), (0, 1), *((entry, GUESSES) for entry in range(1, self.loops + 1))]
        return {way: self.seconds_per_token(*way, lanes) for way in ways}

    def begin(self, now: float, batch: Batch) -> Pace:
        """A step begins: decide. now: seconds on a clock."""
        lanes = batch.lanes
        contest = self._contest(batch)
        # Nobody goes on from the step before: that may have been long ago.
        last = self.last = self.lap if lanes > batch.fresh else None
        if last is not None:
            last.seconds = now - last.began
            last.contest.clock += last.seconds
            if last.plain and last.counts:
                self._plain_lap(last)
        self.plain = (batch.alone or self._open) and lanes > 0 and not batch.led and contest.decide()
        pace = self.quiet if self.plain else self._hasten(self.decide(lanes, batch.hurry), batch)
        self.apart = pace.apart
        counts = last is not None and last.plain == pace.plain
        self.lap = Lap(now, contest, pace.plain, counts, batch.prompts, batch.fresh)
        return pace

    @property
    def _open(self) -> bool:
        """Whether there is a choice between plain steps and others."""
        return self.contested and self.fixed is None

    def _hasten(self, pace: Pace, batch: Batch) -> Pace:
        """This pace, but with no rows ahead of others in the step itself where they would make first tokens late."""
        bare = self.bare(batch)
        return replace(pace, bare=bare, apart=not bare and self.late(batch))

    def bare(self, batch: Batch) -> bool:
        """Whether such a step is to be as in plain decoding, so that first tokens are not late.

        That computes anew what has begun of others' tokens, or is decided and only to be verified. Where passes are
        dear it is enough, and cheaper, that rows which nobody waits for sit out.
        """
        return BESIDE > LATER * self.cost.of(batch.prompts + batch.lanes) and self.late(batch)

    def late(self, batch: Batch) -> bool:
        """Whether rows that run ahead of others would make first tokens of such a step too late.

        A few rows add more to many than those cost by the piece: they are read out, and a plain step has all passes in
        one go. So what they add is taken to be what they add to as many others.
        """
        others = batch.lanes - batch.fresh
        if not (batch.prompts and others and self.abreast and self._open) or batch.led:
            return False
        ahead = 1 + others * (median(self.abreast) - 1)
        added = self.cost.of(2 * ahead) - self.cost.of(ahead)
        return added > LATER * self.cost.of(batch.prompts + batch.lanes)

    def _contest(self, batch: Batch) -> Contest:
        """Of batches of this kind. A new one begins plain where the next smaller batches or greedy ones have come to
        that, since drafting gains less the more requests there are and where tokens are sampled, or where the time of
        passes alone speaks against drafting."""
        lanes, drawn = batch.lanes, batch.drawn
        if not lanes or batch.alone:  # prompts, or requests that are not drafted for: nothing to contest
            return Contest(plain=batch.alone)
        size = bucket(lanes)
        if (size, drawn) not in self.contests:
            smaller = [other for other, same in self.contests if same == drawn and other < size]
            known = [self.contests[max(smaller), drawn]] if smaller else []
            known += [self.contests[size, False]] if (size, False) in self.contests else []
            times = self._times(lanes)
            slow = min(times, key=times.__getitem__) == (self.loops, GUESSES)
            plain = slow or any(contest.plain for contest in known)
            # A trial of drafting is taken to lose half of its steps' time, until one has run.
            lost = LAPS * self.passes * self.cost.of(lanes * self.loops) / 2
            self.contests[size, drawn] = Contest(plain, min(lost / SHARE[0], LONGEST_REST) if plain else 0.0)
        return self.contests[size, drawn]

    def _plain_lap(self, lap: Lap) -> None:
        """What is beyond a usual step is the cost of the prompts in it."""
        usual = lap.contest.laps[True]
        if not lap.prompts:
            lap.contest.lap(True, lap.seconds, lap.committed)
        elif len(usual) >= LAPS:
            beyond = lap.seconds - lap.committed * per_token(usual)
            self.prompts.append((beyond, lap.prompts))

    def end(self, committed: int, plain: bool, busy: bool) -> None:
        """The step's tokens are there. plain: as in `StepReport`. busy: another step follows at once.

        What a burst drafts is committed in the step after it.
        """
        lap, last = self.lap, self.last
        if last is not None and last.counts and not last.plain and committed > lap.fresh:
            self._drafting_lap(last, committed - lap.fresh)
        lap.committed, lap.counts = committed, lap.counts and plain == lap.plain and committed > 0
        if not busy:
            self.lap = None

    def _drafting_lap(self, lap: Lap, committed: int) -> None:
        """Where drafting is fast, steps are few and most of them have prompts in them."""
        if self.prompts:
            seconds, tokens = map(sum, zip(*self.prompts, strict=True))
            each = max(0.0, seconds) / tokens
        else:  # until it was measured: as in large passes
            each = self.loops * (self.cost.of(2 * MOST_TIMED) - self.cost.of(MOST_TIMED)) / MOST_TIMED
        prompts = lap.prompts * each
        if 2 * prompts < lap.seconds:
            lap.contest.lap(False, lap.seconds - prompts, committed)

    def decide(self, lanes: int, hurry: bool) -> Pace:
        """How to draft. lanes, hurry: see `Batch`."""
        passes, pass_seconds = 0 if hurry else self.passes, self.cost.of(lanes * self.loops)
        piece = max(1, int(PIECE / pass_seconds)) if pass_seconds else self.passes
        if self.fixed is not None or not lanes:
            return Pace(self.entry, passes, self.most, piece=piece)
        if self.reckoned is None or self.reckoned[0] != lanes or self.reckoned[1] is not self.cost.points:
            self.reckoned, times = (lanes, self.cost.points), self._times(lanes)
            best = min(times, key=times.__getitem__)
            if times[best] < (1 - GAIN) * times[self.entry, self.most]:
                self.entry, self.most = best
        self.steps += 1
        entry, most = self.entry, self.most
        if self.steps % LOOK == 0:
            # Agreement is only heard of where every readout is fed, hits where lookups are, costs where passes run.
            others = [1, min(entry + 1, self.loops), 0]
            entry, most = others[self.steps // LOOK % len(others)], GUESSES
        return Pace(entry, passes, most, piece=piece)
