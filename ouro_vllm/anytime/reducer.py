"""Events to (committed, provisional): what every client has to do, once, without dependencies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """An answer as far as it is known. `feed` takes the events in their order.

    committed, provisional: texts. token_ids, pieces, depth: of the commits. tail_ids, tail_pieces, tail_depth: of
    the tail. traces: `said` by token index. complete: the tail is the rest of a whole answer. retracted: provisional
    tokens that were taken back. done: the last event, None before it.
    """

    committed: str = ""
    provisional: str = ""
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    depth: list[int | None] = field(default_factory=list)
    tail_ids: list[int] = field(default_factory=list)
    tail_pieces: list[str] = field(default_factory=list)
    tail_depth: list[int] = field(default_factory=list)
    traces: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    complete: bool = False
    retracted: int = 0
    done: dict[str, Any] | None = None

    def feed(self, event: Mapping[str, Any]) -> "Answer":
        """Take in one event; kinds that are not known are passed over. Returns itself.

        Raises:
            ValueError: events are missing: this one does not continue those before.
        """
        kind = event["type"]
        if kind in ("provisional", "commit") and event["index"] != len(self.token_ids):
            raise ValueError(f"a {kind} at token {event['index']}, {len(self.token_ids)} being committed: events lost")
        if kind == "commit":
            self._commit(event)
        elif kind == "provisional":
            self.retracted += len(self.tail_ids) - agreeing(self.tail_ids, event["token_ids"])
            self._show(event["token_ids"], event["pieces"], event["depth"])
            self.complete = event.get("complete", False)
        elif kind == "trace":
            self.traces[event["index"]] = event["said"]
        elif kind in ("done", "error"):
            self.done = dict(event)
        return self

    def _show(self, ids: Iterable[int], pieces: Iterable[str], depth: Iterable[int]) -> None:
        self.tail_ids, self.tail_pieces, self.tail_depth = list(ids), list(pieces), list(depth)
        self.provisional = "".join(self.tail_pieces)

    def _commit(self, event: Mapping[str, Any]) -> None:
        ids, text, count = event["token_ids"], event["text"], len(event["token_ids"])
        self.committed += text
        self.token_ids += ids
        self.pieces += event["pieces"]
        self.depth += event["depth"]
        if not ids and self.pieces:
            self.pieces[-1] += text
        same = agreeing(self.tail_ids, ids)
        if same < count or not self.provisional.startswith(text):
            self.retracted += len(self.tail_ids) - same
            self.complete = False
            self._show([], [], [])
            return
        pieces, rest = self.tail_pieces[count:], self.provisional[len(text) :]
        if pieces:  # text that was held back belongs to the first token that is left
            pieces[0] = rest[: len(rest) - sum(map(len, pieces[1:]))]
        self._show(self.tail_ids[count:], pieces, self.tail_depth[count:])


def agreeing(before: Sequence[int], after: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return next(
        (n for n, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), min(len(before), len(after))
    )


def reduce(events: Iterable[Mapping[str, Any]]) -> Answer:
    """The answer after all `events`. Raises ValueError where `Answer.feed` does."""
    answer = Answer()
    for event in events:
        answer.feed(event)
    return answer
