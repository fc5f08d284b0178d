"""Guesses from the request's own text: what followed the last time that the newest tokens stood together.

Prompt lookup, as vLLM's `ngram` method drafts with (and Arctic's suffix decoding, more thoroughly). Here it fills a gap
that readouts leave: a row that enters has no readout yet, so without a guess only one row can enter per pass. Pure
Python.
"""

from collections.abc import Sequence

from ouro_vllm.wavefront.flight import Row

LONGEST, SHORTEST = 4, 2  # tokens in a row that must have been seen before
MOST_LEARNED = 4096  # tokens that are learned at once: about 10 ms, in which a burst can't be left, and 2 MB


class Lookup:
    """The committed tokens of one request, and what stood last behind runs of SHORTEST to LONGEST of them.

    draft: what its answer may be, from position `start` on. It is followed as long as it is right, and looked up
    in like text that stands before the prompt.
    """

    def __init__(self, draft: Sequence[int] = (), start: int = 0) -> None:
        self.tokens: list[int] = []
        self.draft, self.start, self.right = draft, start, bool(draft)
        self._after: dict[tuple[int, ...], int] = {}
        for place in range(len(draft)):
            self._learn(draft, place)

    def _learn(self, tokens: Sequence[int], place: int) -> None:
        for length in range(SHORTEST, min(LONGEST, place) + 1):
            self._after[tuple(tokens[place - length : place])] = tokens[place]

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that are committed, next in the sequence. Of a long prompt only the end is looked up in."""
        older = len(self.tokens) + len(tokens) - MOST_LEARNED
        for token in tokens:
            place = len(self.tokens)
            self.tokens.append(token)
            if place >= older:
                self._learn(self.tokens, place)
            if place >= self.start:
                self.right = self.right and self.draft[place - self.start : place - self.start + 1] == [token]

    def guess(self, tail: Sequence[int]) -> int | None:
        """The token that may follow `tail`, after its longest run seen before; None if there is none."""
        for length in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
            token = self._after.get(tuple(tail[-length:]))
            if token is not None:
                return token
        return None

    def follow(self, rows: Sequence[Row]) -> int | None:
        """The draft's token behind `rows`, the last of which is the newest; None where the draft ends or was wrong."""
        place = rows[-1].position + 1 - self.start
        if not self.right or not 0 <= place < len(self.draft):
            return None
        first = max(0, self.start - rows[0].position)  # rows of the prompt
        under_way = [row.token for row in rows[first:]]
        return self.draft[place] if self.draft[place - len(under_way) : place] == under_way else None
