"""Which keys and values a row reads when loops share a KV cache: a rule of its position and the prompt's length.

Pure Python. Nothing else enters the rule (not the batch, the step, speculation, or what was cached), so an answer does
not depend on how its work was cut up. Reuse in decoding only, as in arXiv 2510.25741, section 6 and Table 14: tokens of
the prompt always read their own loop.
"""

from collections.abc import Iterator
from dataclasses import dataclass

PER_LOOP, LAST, AVERAGE = "per_loop", "last", "average"
POLICIES = (PER_LOOP, LAST, AVERAGE)


@dataclass(frozen=True)
class Sharing:
    """A policy with its sizes.

    policy: LAST shares the last loop's keys and values, AVERAGE the mean over all loops'.
    window: newest tokens, its own among them, of which a generated token reads its own loop, 1 at least.
    block: tokens per KV block; the window's start is rounded down to one.
    """

    policy: str
    window: int
    block: int

    def start(self, position: int, prompt: int) -> int:
        """First position of which a row at `position` reads its own loop; prompt: tokens in its request's prompt.

        A multiple of `block`. Everything before it is read as shared.
        """
        if position < prompt:
            return 0
        return max(0, position - self.window + 1) // self.block * self.block

    def runs(self, first: int, end: int, prompt: int) -> Iterator[tuple[int, int]]:
        """Cut positions first to end - 1 into runs that can go through all loops in lockstep, in this order.

        What a run reads as shared lies before the run. The first run is the part in the prompt, which may be empty.
        """
        until = min(max(first, prompt), end)
        yield first, until
        while until < end:
            begin = until
            # The first position behind whose window start lies behind `begin`.
            until = min(end, (begin // self.block + 1) * self.block + self.window - 1)
            yield begin, until

    def pieces(self, first: int, end: int, prompt: int) -> Iterator[tuple[int, int]]:
        """Cut a run into pieces whose rows all have the same window start."""
        begin = first
        while begin < end:
            start = self.start(begin, prompt)
            until = min(end, prompt) if begin < prompt else min(end, start + self.block + self.window - 1)
            yield begin, until
            begin = until
