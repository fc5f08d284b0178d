"""What a request may ask for (`"anytime": {...}` in its body) and the events of the answer. Pure Python.

The answer is a stream of server-sent events, each one JSON object. `index` counts the answer's tokens from 0.
    provisional: from token `index` on, these tokens are now the tail; whatever was there is gone. `complete`: it is a
        whole answer. `depth`: loops behind each of them, 0 for a guess from the request's own text.
    commit: these tokens are final. They take the place of the first tokens of the tail; if they are the same tokens,
        and the tail's text begins with theirs, what is behind them stands, otherwise the tail is gone. `depth`: the
        loop that decided each, null where it is not known.
    trace: what each loop read out for one committed token, with its probability and the exit gate's lambda.
    done: the last one, `[DONE]` behind it. What is provisional then stays so: the best answer at a deadline.
    error: in place of done.
`text` is the text that the event adds. Where a character is spread over several tokens, or a stop string may be on its
way, the text of a token comes with a later one; texts of all commits together are the answer. `pieces`: `text`, cut at
its tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ouro_vllm.options import OptionError

MODES = ("tail", "progressive")
LONGEST_MS = 24 * 3600 * 1000
END = "data: [DONE]\n\n"
Event = dict[str, Any]


@dataclass(frozen=True)
class AnytimeOptions:
    """Options of one request.

    mode: "tail" shows what is in flight; "progressive" shows a whole answer of depth 1 first, then revises it.
    deadline_ms: milliseconds after which the stream ends with the best answer so far; None: none.
    trace: whether to send trace events.
    """

    mode: str = MODES[0]
    deadline_ms: int | None = None
    trace: bool = False

    @classmethod
    def parse(cls, given: Any) -> "AnytimeOptions":
        """Read the body's `anytime` object; None stands for no options.

        Raises:
            OptionError: an unknown key, a wrong type or a value out of range.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise OptionError(f"`anytime` must be an object of options, got {given!r}.")
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                allowed = ", ".join(f"`{known}`" for known in names)
                raise OptionError(f"unknown option `anytime.{name}`. Allowed: {allowed}.")
        mode, deadline, trace = given.get("mode", MODES[0]), given.get("deadline_ms"), given.get("trace", False)
        if mode not in MODES:
            raise OptionError(f"`anytime.mode` is {mode!r}; it must be {' or '.join(map(json.dumps, MODES))}.")
        whole = isinstance(deadline, int) and not isinstance(deadline, bool)
        if deadline is not None and not (whole and 1 <= deadline <= LONGEST_MS):
            raise OptionError(
                f"`anytime.deadline_ms` is {deadline!r}; it must be a whole number from 1 to {LONGEST_MS}."
            )
        if not isinstance(trace, bool):
            raise OptionError(f"`anytime.trace` is {trace!r}; it must be true or false.")
        return cls(mode, deadline, trace)


def provisional(index: int, token_ids: Sequence[int], pieces: Sequence[str], depth: Sequence[int]) -> Event:
    """The tail from token `index` on; token_ids, pieces and depth are of equal length."""
    named = {"token_ids": list(token_ids), "text": "".join(pieces), "pieces": list(pieces), "depth": list(depth)}
    return {"type": "provisional", "index": index, **named}


def commit(
    index: int, token_ids: Sequence[int], text: str, pieces: Sequence[str], depth: Sequence[int | None]
) -> Event:
    """Final tokens; token_ids, pieces and depth are of equal length. Text that was held back may come without any."""
    named = {"token_ids": list(token_ids), "text": text, "pieces": list(pieces), "depth": list(depth)}
    return {"type": "commit", "index": index, **named}


def trace(index: int, token_id: int, said: Sequence[Mapping[str, Any]]) -> Event:
    """said: per loop, from the first: `depth`, `token_id`, `text`, `probability` and `lambda`."""
    return {"type": "trace", "index": index, "token_id": token_id, "said": [dict(loop) for loop in said]}


def done(reason: str | None, prompt: int, committed: int, provisional: int, depth: float | None) -> Event:
    """reason: vLLM's finish reasons or "deadline". prompt, committed, provisional: tokens. depth: mean of commits."""
    usage = {"prompt_tokens": prompt, "completion_tokens": committed, "total_tokens": prompt + committed}
    counts = {"committed": committed, "provisional": provisional, "depth": depth}
    return {"type": "done", "finish_reason": reason, "usage": usage, **counts}


def error(message: str, kind: str, code: int) -> Event:
    """kind and code: as in vLLM's own errors."""
    return {"type": "error", "error": {"message": message, "type": kind, "code": code}}


def encoded(event: Event) -> str:
    """The event on the wire. ASCII: readers of lines disagree about which other characters end one."""
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n"


def decoded(line: str) -> Event | None:
    """The event of one line of a stream; None for lines without one, `[DONE]` among them."""
    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
    return json.loads(data) if data and data != "[DONE]" else None
