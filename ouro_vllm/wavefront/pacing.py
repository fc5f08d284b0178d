"""How eager the wavefront is, chosen from measured figures.

The choice is `entry`: how many loops a row must have run before its readout is fed. 1 commits most per pass and runs the
most rows; R feeds only decided tokens, which is plain decoding with the passes of several tokens in one engine step.
Rows are nearly free while a pass is bound by reading weights and cost time in proportion once it is bound by computing,
so the best choice depends on the machine, the model and the batch. Pure Python.
"""

from dataclasses import dataclass, field

from ouro_vllm.wavefront.waves import Counts

MEMORY = 0.98  # weight of the past, per observation, in running means of pass times
TOKENS = 2000.0  # finished rows that the agreement is averaged over
PRIOR = 16.0  # weight, in rows, of the agreement assumed before any was seen
GAIN = 0.03  # another entry must promise this much before it is chosen


@dataclass(frozen=True)
class Pace:
    """What the scheduler decides and ships with its output, so that all ranks do the same.

    entry: see `Flight.boarding`. passes: of the burst after this step.
    """

    entry: int
    passes: int


@dataclass
class StepReport:
    """What a step reports back. committed: tokens that vLLM's sampler decided in it."""

    counts: Counts
    committed: int


def passes_per_token(settled: list[float], entry: int) -> float:
    """settled: chance, per loop from the first, that a readout is final from there on. Of a long answer."""
    return sum(chance * max(entry, loop) for loop, chance in enumerate(settled, 1))


def rows_per_token(settled: list[float], entry: int) -> float:
    """Rows computed per token: R of use, and those that a wrong readout brought in before it was corrected."""
    wasted = 0.0
    for loop, chance in enumerate(settled, 1):
        wasted += chance * sum(1 + age // entry for age in range(loop - entry))
    return len(settled) + wasted


class PassCost:
    """Seconds that a pass of n rows takes: running means, and straight lines between them."""

    def __init__(self) -> None:
        self.means: dict[int, float] = {}

    def learn(self, rows: int, seconds: float) -> None:
        """One pass. A single outlier counts for no more than twice the mean."""
        mean = self.means.get(rows)
        self.means[rows] = seconds if mean is None else MEMORY * mean + (1 - MEMORY) * min(seconds, 2 * mean)

    def of(self, rows: float) -> float:
        """Seconds for `rows`, never fewer than for less rows; 0 while nothing is known."""
        known = sorted(self.means.items())
        if not known:
            return 0.0
        below = [point for point in known if point[0] <= rows]
        above = [point for point in known if point[0] > rows]
        if not below:
            return above[0][1]
        if not above:
            (n, t) = below[-1]
            return t * max(1.0, rows / n) if n >= 16 else t
        (n0, t0), (n1, t1) = below[-1], above[0]
        return t0 + max(0.0, t1 - t0) * (rows - n0) / (n1 - n0)


@dataclass
class Pacer:
    """Learns from reports and decides.

    loops: R. passes: most per burst. fixed: an entry to use always, None to choose.
    """

    loops: int
    passes: int
    fixed: int | None = None
    cost: PassCost = field(default_factory=PassCost)

    def __post_init__(self) -> None:
        weights = [1.0 / (loop + 1) ** 2 for loop in range(self.loops)]
        self.settled = [PRIOR * weight / sum(weights) for weight in weights]
        self.entry = self.fixed or 1

    def learn(self, report: StepReport) -> None:
        """Take in what one step measured."""
        counts = report.counts
        for rows, seconds in counts.shapes:
            self.cost.learn(rows, seconds)
        for loop, count in enumerate(counts.settled):
            self.settled[loop] += count
        total = sum(self.settled)
        if total > TOKENS:
            self.settled = [count * TOKENS / total for count in self.settled]

    def chances(self) -> list[float]:
        """Per loop from the first: how often a readout was final from that loop on."""
        total = sum(self.settled)
        return [count / total for count in self.settled]

    def seconds_per_token(self, entry: int, lanes: int) -> float:
        """Expected time per step in which each of `lanes` requests gets one token."""
        chances = self.chances()
        passes = passes_per_token(chances, entry)
        return passes * self.cost.of(lanes * rows_per_token(chances, entry) / passes)

    def decide(self, lanes: int, hurry: bool) -> Pace:
        """lanes: requests that decode. hurry: someone waits for the next step, so no burst may come before it."""
        if self.fixed is None and lanes:
            times = {entry: self.seconds_per_token(entry, lanes) for entry in range(1, self.loops + 1)}
            best = min(times, key=times.__getitem__)
            if times[best] < (1 - GAIN) * times[self.entry]:
                self.entry = best
        return Pace(self.entry, 0 if hurry else self.passes)
