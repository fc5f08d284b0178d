"""From single measurements to medians, ratios and the projection. Pure Python."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from statistics import median
from typing import Any

PROJECTION = (
    "a projection, not a measurement: the ratio to plain, all places of the batch taken, on a machine where a pass "
    "costs the same up to flat_rows rows and in proportion to its rows beyond, and where nothing else costs time; from "
    "the passes and rows counted here"
)


@dataclass
class Measurement:
    """One mode answering all requests of one batch size once.

    seconds: from the first request's arrival to the last token. tokens: what came out, of all requests.
    first_token: seconds from a request's arrival to its first token, the median over requests.
    decoding_seconds, decoding_tokens: from each request's first token to its last, and the tokens behind the first, of
        all requests together.
    kv_bytes: held when contexts were longest, per token of context then; context: tokens that a request has in the
        middle of its answer, the mean over requests; loop_bytes: keys and values of one token and loop.
    passes, rows, lane_passes, restarts, dropped, agreed, judged, settled, committed: as in `wavefront.waves.Counts` and
        `wavefront.pacing.StepReport`; for plain decoding R passes and R rows per token, by definition.
    pass_seconds: time in passes, readouts between them included; None where it was not measured.
    entries: engine steps per entry loop that the pace had chosen.
    compared, identical: requests whose answer was compared with plain's, and those whose answer was the same.
    differ_at: number (from 0) of the first token that was another, of those that were not.
    """

    seconds: float
    requests: int
    tokens: int
    first_token: float
    decoding_seconds: float = 0.0
    decoding_tokens: int = 0
    kv_bytes: float = 0.0
    context: float = 0.0
    loop_bytes: int = 0
    passes: int = 0
    rows: int = 0
    lane_passes: int = 0
    committed: int = 0
    restarts: int = 0
    dropped: int = 0
    agreed: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    pass_seconds: float | None = None
    entries: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    identical: int = 0
    differ_at: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def decoding_rate(self) -> float:
        """Tokens per second of one request once its prompt is done."""
        return self.decoding_tokens / self.decoding_seconds if self.decoding_seconds else 0.0

    def compare(self, outputs: Sequence[Sequence[int]], base: Sequence[Sequence[int]]) -> None:
        """Note how the answers (token ids per request) differ from the base's, as far as both have the request."""
        places = [first_difference(mine, theirs) for mine, theirs in zip(outputs, base, strict=False)]
        self.compared = len(places)
        self.differ_at = [place for place in places if place is not None]
        self.identical = self.compared - len(self.differ_at)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two answers differ, the end of the shorter included; None if they are the same."""
    for place, (a, b) in enumerate(zip_longest(one, other)):
        if a != b:
            return place
    return None


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": median(values), "least": min(values), "most": max(values)}


def summed(rounds: Sequence[Measurement]) -> dict[str, Any]:
    """Sums of the counts over rounds, lists entry by entry; pass_seconds is None if one round lacks it."""
    sums: dict[str, Any] = {}
    for name in (entry.name for entry in fields(Measurement)):
        values = [getattr(one, name) for one in rounds]
        if name in ("agreed", "judged", "settled"):
            sums[name] = [sum(column) for column in zip_longest(*values, fillvalue=0)]
        elif name == "entries":
            sums[name] = dict(sum((Counter(value) for value in values), Counter()))
        elif name == "differ_at":
            sums[name] = [value for several in values for value in several]
        else:
            sums[name] = None if None in values else sum(values)
    return sums


def projected_ratio(loops: int, passes_per_token: float, rows_per_lane_pass: float, batch: int, flat: int) -> float:
    """The ratio to plain that PROJECTION speaks of.

    passes_per_token and rows_per_lane_pass are of one request; a pass of the full batch carries batch times those rows,
    and batch rows under plain decoding. flat: rows up to which a pass costs the same.
    """

    def cost(rows: float) -> float:
        return max(1.0, rows / flat)

    return loops * cost(batch) / (passes_per_token * cost(batch * rows_per_lane_pass))


def summary(
    rounds: Sequence[Measurement], base: Sequence[Measurement], loops: int, batch: int, flat: int
) -> dict[str, Any]:
    """What the rounds of one mode at one batch size say.

    base: plain's rounds at this size, in the same order; loops: R; flat: see `projected_ratio`. `kv_bytes_read` is what
    rows read if each does by itself: those that share a sequence read less.
    """
    sums = summed(rounds)
    ratio = spread(one.rate / other.rate for one, other in zip(rounds, base, strict=True))
    decoding = [
        one.decoding_rate / other.decoding_rate for one, other in zip(rounds, base, strict=True) if other.decoding_rate
    ]
    rows_per_token = sums["rows"] / sums["committed"]
    passes_per_token = sums["lane_passes"] / sums["committed"]
    outside = None if sums["pass_seconds"] is None else 1 - sums["pass_seconds"] / sums["seconds"]
    judged = zip(sums["agreed"], sums["judged"], strict=True)
    return {
        "tokens_per_second": spread(one.rate for one in rounds),
        "ratio": ratio,
        "decoding_ratio": spread(decoding) if decoding else None,
        "share_of_bound": ratio["median"] * passes_per_token / loops,
        "passes_per_token": passes_per_token,
        "rows_per_token": rows_per_token,
        "rows_per_pass": sums["rows"] / sums["passes"],
        "restarts_per_token": sums["restarts"] / sums["committed"],
        "agreement": [agreed / count if count else None for agreed, count in judged],
        "outside_passes": outside,
        "first_token_seconds": spread(one.first_token for one in rounds),
        "kv_bytes_held": median(one.kv_bytes for one in rounds),
        "kv_bytes_read": median(rows_per_token * one.context * one.loop_bytes for one in rounds),
        "identical": sums["identical"] / sums["compared"],
        "first_difference": spread(sums["differ_at"]) if sums["differ_at"] else None,
        "entry": max(sums["entries"], key=sums["entries"].__getitem__, default=None),
        "projected_ratio": projected_ratio(loops, passes_per_token, sums["rows"] / sums["lane_passes"], batch, flat),
    }


def summaries(series: dict[str, Any], base: str, loops: int, flat: int) -> None:
    """Write a summary beside the rounds of every mode and batch size: {mode: {batch: {"rounds": [...]}}}."""
    measured = {
        mode: {batch: [Measurement(**one) for one in cell["rounds"]] for batch, cell in sizes.items()}
        for mode, sizes in series.items()
    }
    for mode, sizes in measured.items():
        for batch, rounds in sizes.items():
            series[mode][batch]["summary"] = summary(rounds, measured[base][batch], loops, int(batch), flat)


def as_json(measurement: Measurement) -> dict[str, Any]:
    """For a JSON file; `Measurement(**...)` reads it back."""
    return asdict(measurement)
