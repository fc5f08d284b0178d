"""A request's outputs as they come from the engine, told as events. Pure Python.

What is committed is vLLM's own text, so that it is the plain endpoint's answer, stop strings and all. What is
provisional is decoded here, behind it, and never shown beyond a stop string.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ouro_vllm.anytime import protocol
from ouro_vllm.anytime.pieces import Text, cut
from ouro_vllm.anytime.protocol import Event
from ouro_vllm.anytime.reducer import Answer

AGAIN = 4  # tokens in a row that must be those of the draft for its remainder to be taken up again
GROWTH = 16  # a growing draft is sent again when it has grown by one part of so many


class Transcript:
    """Events of one answer.

    decode: token ids -> text. prompt: its token ids. stops: stop strings. trace: whether traces are wanted.
    longest: tokens that the answer can have, None if that is not known.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int],
        stops: Sequence[str],
        trace: bool,
        longest: int | None = None,
    ) -> None:
        self.longest = longest
        self.stops, self.trace, self.prompt = [stop for stop in stops if stop], trace, len(prompt)
        self.decode, self.text, self.draft_text = decode, Text(decode, prompt), Text(decode, prompt)
        self.client = Answer()  # what a client knows that got all events
        self.draft: list[int] = []
        self.draft_pieces: list[str] = []
        self.shown = 0  # tokens of the draft when it was last sent

    def _say(self, event: Event) -> Event:
        self.client.feed(event)
        return event

    # A draft of the whole answer.

    def drafted(self, token_ids: Sequence[int], text: str, depth: int, complete: bool) -> list[Event]:
        """More tokens of a draft made at `depth`, which is shown as the tail."""
        self.draft += token_ids
        self.draft_pieces += self.draft_text.take(token_ids, text)
        if not token_ids and self.draft_pieces:
            self.draft_pieces[-1] += text
        if not complete and len(self.draft) < self.shown + max(1, self.shown // GROWTH):
            return []
        self.shown = len(self.draft)
        event = protocol.provisional(0, self.draft, self.draft_pieces, [depth] * len(self.draft))
        return [self._say({**event, "complete": True} if complete else event)]

    # The answer.

    def told(self, token_ids: Sequence[int], text: str, frame: Any, finished: bool) -> list[Event]:
        """New tokens, the new text, and the engine's frame if there is one."""
        client, start = self.client, len(self.client.token_ids)
        frame = frame if isinstance(frame, dict) else {}
        events = []
        if start == 0 and token_ids and frame.get("first") and not client.tail_ids:
            token, depth = frame["first"]
            events.append(self._say(protocol.provisional(0, [token], self._behind([token]), [depth])))
        if token_ids or text:
            events += self._committed(token_ids, text, frame)
        tail, depths = self._tail(frame, finished)
        if tail != client.tail_ids or (tail and not self.draft and depths != client.tail_depth):
            events.append(self._say(protocol.provisional(len(client.token_ids), tail, self._behind(tail), depths)))
        return events

    def _committed(self, token_ids: Sequence[int], text: str, frame: dict[str, Any]) -> list[Event]:
        start, pieces = len(self.client.token_ids), self.text.take(token_ids, text)
        decided, said = frame.get("decided") or [], frame.get("said") or []
        first = frame.get("index", 0) - len(decided)  # number of the first token that the frame knows of
        places = range(start - first, start - first + len(pieces))
        depths = [decided[place] if 0 <= place < len(decided) else None for place in places]
        events = [self._say(protocol.commit(start, token_ids, text, pieces, depths))]
        for number, token in enumerate(token_ids, start) if self.trace else ():
            if 0 <= number - first < len(said) and said[number - first]:
                loops = [
                    {"depth": int(depth), "token_id": int(read), "text": self.decode([int(read)])}
                    | {"probability": round(probability, 4), "lambda": round(gate, 4)}
                    for depth, read, probability, gate in said[number - first]
                ]
                events.append(self._say(protocol.trace(number, token, loops)))
        return events

    def _tail(self, frame: dict[str, Any], finished: bool) -> tuple[list[int], list[int]]:
        """What should be provisional now, and the loops behind it."""
        client = self.client
        if finished:
            return [], []
        known = len(client.token_ids)
        if self.draft and client.tail_ids and client.complete:
            return client.tail_ids, client.tail_depth  # the draft's remainder, not contradicted yet
        tail, depths = [], []
        if frame.get("index") == known:
            tail, depths = list(frame["tokens"]), list(frame["depths"])
        if self.draft:
            rest = remainder(self.draft, client.token_ids + tail)
            tail, depths = tail + rest, depths + [1] * len(rest)
        if self.longest is not None:  # what is left of a draft may be more than there is room for
            tail, depths = tail[: self.longest - known], depths[: self.longest - known]
        return tail, depths

    def _behind(self, tail: list[int]) -> list[str]:
        """The pieces of `tail`, empty from a stop string on."""
        pieces = self.text.ahead(tail)
        text = "".join(pieces)
        ends = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        return cut(text[: min(ends)], pieces) if ends else pieces

    def done(self, reason: str | None) -> Event:
        """The last event."""
        known = [depth for depth in self.client.depth if depth is not None]
        mean = round(sum(known) / len(known), 3) if known else None
        return self._say(
            protocol.done(reason, self.prompt, len(self.client.token_ids), len(self.client.tail_ids), mean)
        )


def remainder(draft: Sequence[int], known: Sequence[int]) -> list[int]:
    """What follows in `draft` where the latest AGAIN tokens of `known` stand in it, nearest to their own place."""
    latest, place = list(known[-AGAIN:]), len(known)
    if len(latest) < AGAIN:
        return []
    found = [end for end in range(AGAIN, len(draft) + 1) if list(draft[end - AGAIN : end]) == latest]
    return list(draft[min(found, key=lambda end: abs(end - place)) :]) if found else []
