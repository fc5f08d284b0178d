"""What an engine sends beside the tokens of a request that asked: one frame per step. Pure Python.

A frame is made of what `json` knows, for it travels as an entry of `EngineCoreOutput.kv_transfer_params` (KV connectors
are refused for Ouro, so the field is free), is routed with the request's output and arrives in
`RequestOutput.kv_transfer_params`. A reader that is late gets outputs merged and of their frames the newest: so frames
repeat what belongs to the latest tokens, and whatever is older is lost to that reader.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ouro_vllm.names import PLUGIN
from ouro_vllm.wavefront.flight import Flight, Row

FRAMES = f"{PLUGIN}_frames"  # attribute of vLLM's ModelRunnerOutput: frame by request
HISTORY = 64  # tokens that a frame repeats the particulars of
Frame = dict[str, Any]


class Watch:
    """What is remembered of one request that asked; bounded.

    traced: whether its trace is wanted.
    """

    def __init__(self, traced: bool) -> None:
        self.traced = traced
        self.first: list[int] | None = None
        self.decided: deque[int | None] = deque(maxlen=HISTORY)
        self.said: deque[list[list[float]]] = deque(maxlen=HISTORY)

    def commit(self, flight: Flight, position: int, tokens: int) -> None:
        """The step decided `tokens` tokens, the last of which stands at `position`; the flight is as it was before."""
        rows = {row.position: row for row in flight.rows}
        for place in range(position - tokens, position):
            row = rows.get(place)
            if not self.decided and row and row.heard:
                self.first = [row.heard[0], row.since]
            # Without a row it was computed plainly, after a failed pass or a preemption.
            self.decided.append(row.exit or row.depth if row else None)
            if self.traced:
                self.said.append(readouts(row) if row else [])

    def frame(self, flight: Flight | None, position: int, index: int) -> Frame:
        """position: of the newest committed token, which is number `index` - 1 of the answer.

        `tokens` and `depths` are the tail. `first`: what was read out first for the answer's first token, and at which
        loop. `decided` and `said` are of the tokens before `index`, the latest HISTORY of them at most.
        """
        tokens, depths = ahead(flight, position) if flight else ([], [])
        named = {"tokens": tokens, "depths": depths, "first": self.first, "decided": list(self.decided)}
        return {"index": index, **named, "said": list(self.said)}


def readouts(row: Row) -> list[list[float]]:
    """[loop, token, probability, lambda] of each readout, in the order of the loops."""
    return [
        [row.since + number, token, *said]
        for number, (token, said) in enumerate(zip(row.heard, row.said, strict=False))
    ]


def ahead(flight: Flight, position: int) -> tuple[list[int], list[int]]:
    """Tokens that are provisional behind `position`, and the loops behind each: 0 for a guess not yet read out."""
    rows: Sequence[Row] = flight.rows
    if not rows or rows[0].position != position:
        return [], []
    tokens = [(row.token, loops(older)) for older, row in pairwise(rows)]
    if rows[-1].heard:
        tokens.append((rows[-1].heard[-1], loops(rows[-1])))
    for place, (token, _) in enumerate(tokens):
        if token in flight.stops:
            tokens = tokens[:place]
            break
    return [token for token, _ in tokens], [depth for _, depth in tokens]


def loops(row: Row) -> int:
    """Loops behind the row's latest readout, 0 if there is none."""
    return row.since + len(row.heard) - 1 if row.heard else 0
