"""Guesses from the request's own text: what followed the last time that the newest tokens stood together.

Prompt lookup, as vLLM's `ngram` method drafts with (and Arctic's suffix decoding, more thoroughly). Here it fills a gap
that readouts leave: a row that enters has no readout yet, so without a guess only one row can enter per pass. Pure
Python.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens in a row that must have been seen before


class Lookup:
    """The committed tokens of one request, and where runs of SHORTEST to LONGEST of them ended last."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that are committed, next in the sequence."""
        for token in tokens:
            place = len(self.tokens)
            for length in range(SHORTEST, LONGEST + 1):
                if length <= place:
                    self._after[tuple(self.tokens[place - length :])] = place
            self.tokens.append(token)

    def guess(self, tail: Sequence[int]) -> int | None:
        """The token that may follow `tail`, after its longest run seen before; None if there is none."""
        for length in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
            place = self._after.get(tuple(tail[-length:]))
            if place is not None:
                return self.tokens[place]
        return None
