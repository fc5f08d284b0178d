"""What depths and self-speculation add to /metrics and to the log.

Names follow vLLM's (`vllm:...`), with `ouro` where vLLM has no such thing. vLLM's own acceptance (`vllm:spec_decode_*`)
reads near 1 under self-speculation, because drafts are proposed only once the last loop has decided them; how well
early loops guess is `vllm:ouro_readouts_agreed` to `vllm:ouro_readouts`.
"""

from functools import cache
from typing import Any

from ouro_vllm.options import MOST_LOOPS
from ouro_vllm.wavefront.waves import Counts

PER_LOOP = ("agreed", "judged")
SUMS = {
    "passes": ("vllm:ouro_passes", "Passes of the stack that carried decoding rows."),
    "lane_passes": ("vllm:ouro_request_passes", "The same, counted once for every request in the pass."),
    "rows": ("vllm:ouro_rows", "Rows (request, position) that passes carried."),
    "dropped": ("vllm:ouro_rows_dropped", "Rows that left because a deeper readout disagreed with their token."),
    "restarts": ("vllm:ouro_restarts", "Times that a request restarted from a corrected token."),
    "finished": ("vllm:ouro_rows_finished", "Rows that were decided: by their last loop, or by the gate."),
    "seconds": ("vllm:ouro_pass_seconds", "Time in passes, those of prompts alone among them."),
}


def carried(counts: Counts, committed: int, in_flight: int, entry: int, plain: bool) -> dict[str, Any]:
    """What the scheduler sends to the process that serves /metrics: plain numbers and lists, for one step."""
    return {
        **{name: getattr(counts, name) for name in SUMS},
        **{name: list(getattr(counts, name)) for name in PER_LOOP},
        "committed": committed,
        "in_flight": in_flight,
        "entry": entry,
        "drafting": not plain,
    }


class Exported:
    """The metrics in this process's registry."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        labels, latest = ["engine"], {"multiprocess_mode": "mostrecent"}  # of several API servers, as vLLM's own gauges
        self.sums = {name: Counter(metric, text, labels) for name, (metric, text) in SUMS.items()}
        self.tokens = Counter("vllm:ouro_tokens", "Tokens committed by requests under self-speculation.", labels)
        self.per_loop = {
            "agreed": Counter(
                "vllm:ouro_readouts_agreed", "Readouts equal to the one that decided.", [*labels, "loop"]
            ),
            "judged": Counter(
                "vllm:ouro_readouts", "Readouts of decided rows, the deciding ones too.", [*labels, "loop"]
            ),
        }
        self.in_flight = Gauge("vllm:ouro_rows_in_flight", "Rows kept between passes.", labels, **latest)
        self.entry = Gauge("vllm:ouro_entry_loop", "Loops a row has run when its readout is fed.", labels, **latest)
        self.drafting = Gauge("vllm:ouro_drafting", "1 where steps draft, 0 where they are plain.", labels, **latest)
        loops = range(1, MOST_LOOPS + 1)
        self.depth = Histogram("vllm:ouro_exit_depth", "Loops that tokens were read after.", labels, buckets=loops)
        self.mean = Gauge(
            "vllm:ouro_mean_depth", "Mean of the loops that tokens were read after, so far.", labels, **latest
        )
        self.read: dict[str, tuple[int, int]] = {}  # engine: tokens, sum of their loops
        self.known: set[str] = set()  # engines

    def observe(self, step: dict[str, Any], engine: int) -> None:
        """step: what `carried` made, or `exits`, tokens by loop (see `tally`), or both.

        engine: index among data-parallel engines.
        """
        label = str(engine)
        tokens, loops = self.read.get(label, (0, 0))
        depth = self.depth.labels(label)
        for loop, count in enumerate(step.get("exits", ()), 1):
            for _ in range(count):
                depth.observe(loop)
            tokens, loops = tokens + count, loops + count * loop
        if "exits" in step:
            self.read[label] = tokens, loops
            self.mean.labels(label).set(loops / tokens)
        if "committed" not in step:
            return
        new = label not in self.known  # then all that there is to count is shown, as 0 too
        self.known.add(label)
        for name, counter in self.sums.items():
            if step[name] or new:
                counter.labels(label).inc(step[name])
        for name, counter in self.per_loop.items():
            for loop, count in enumerate(step[name], 1):
                if count or new:
                    counter.labels(label, str(loop)).inc(count)
        self.tokens.labels(label).inc(step["committed"])
        self.in_flight.labels(label).set(step["in_flight"])
        self.entry.labels(label).set(step["entry"])
        self.drafting.labels(label).set(step["drafting"])


@cache
def exported() -> Exported:
    """This process's metrics, registered at the first call."""
    return Exported()


def summary(counts: Counts, committed: int, entry: int, plain: bool) -> str:
    """One log line over the sums of a while."""
    agreement = ", ".join(
        f"{agreed / judged:.2f}" if judged else "-"
        for agreed, judged in zip(counts.agreed[:-1], counts.judged[:-1], strict=True)
    )
    agreement = f"agreement of earlier loops with the last {agreement}, " if agreement else ""
    return (
        f"Self-speculation: {counts.lane_passes / max(1, committed):.2f} passes per token, "
        f"{counts.rows / max(1, counts.passes):.1f} rows per pass, {counts.rows / max(1, committed):.2f} per token, "
        + agreement
        + ("steps are plain now." if plain else f"readouts fed from loop {entry} on.")
    )
