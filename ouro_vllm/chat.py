"""`ouro-vllm chat`: a chat in the terminal. The tail is dim; it settles into plain text, or is taken back."""

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import sys
import unicodedata
import urllib.request
from collections.abc import Callable
from typing import Any

from ouro_vllm.anytime import Answer, AnytimeError, events

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
TAB = 4


class Screen:
    """Settled text with a dim tail behind it, on a terminal that knows ANSI's cursor movements.

    Lines are broken here, before the last column, so that where the cursor stands never depends on how a terminal
    wraps. A tail that would not fit on the screen is shown up to its last line but one.
    """

    def __init__(self, write: Callable[[str], Any], columns: int, lines: int) -> None:
        """write: takes what goes to the terminal. columns, lines: its size."""
        self.write, self.columns, self.lines = write, max(8, columns), max(2, lines)
        self.column = 0  # behind the settled text
        self.tail, self.below = "", 0  # the tail, and how many lines below the settled text it ends

    def settle(self, text: str) -> None:
        """More settled text, in place of the tail."""
        self._clear()
        broken, self.column, _ = self._broken(text, self.column)
        self.write(broken)

    def show(self, tail: str) -> None:
        """The tail is now this."""
        if tail == self.tail:
            return
        self._clear()
        broken, _, below = self._broken(tail, self.column)
        if below >= self.lines:
            broken, below = "\n".join(broken.split("\n")[: self.lines]), self.lines - 1
        if broken:
            self.write(f"{DIM}{broken}{PLAIN}")
        self.tail, self.below = tail, below

    def _clear(self) -> None:
        if self.tail:
            up = f"\x1b[{self.below}A" if self.below else ""
            right = f"\x1b[{self.column}C" if self.column else ""
            self.write(f"{up}\r{right}\x1b[J")
        self.tail, self.below = "", 0

    def _broken(self, text: str, column: int) -> tuple[str, int, int]:
        """The text with line ends where they are needed, the column behind it, and how many lines it ends below."""
        out, below = [], 0
        for character in text:
            if character == "\n":
                out.append(character)
                column, below = 0, below + 1
                continue
            shown = " " * TAB if character == "\t" else character
            width = sum(map(columns_of, shown))
            if not shown.isprintable() and width:
                continue
            if column + width >= self.columns:
                out.append("\n")
                column, below = 0, below + 1
            out.append(shown)
            column += width
        return "".join(out), column, below


def columns_of(character: str) -> int:
    """How many columns a terminal gives to a character."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


async def answer(url: str, key: str | None, body: dict[str, Any], show: Callable[[Answer], Any]) -> Answer:
    """Ask, call `show` after every event, return the answer. Raises AnytimeError."""
    known = Answer()
    async for event in events(url, body, key):
        show(known.feed(event))
    return known


def served_model(url: str, key: str | None) -> str:
    """The name of the first model that the server lists. Raises OSError, or ValueError on an answer of another kind."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/models", headers=headers), timeout=10) as response:
            return json.load(response)["data"][0]["id"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("it lists no models") from error
    except http.client.HTTPException as error:
        raise ValueError(f"it does not speak HTTP ({error!r})") from error


def main(url: str, key: str | None, model: str | None, options: dict[str, Any]) -> int:
    """Chat until the end of the input. url: of the API, ending in /v1. options: of the request's body.

    Returns 0, or 1 after saying what went wrong with the server.
    """
    url, key = url.rstrip("/"), key or os.environ.get("OPENAI_API_KEY")
    try:
        model = model or served_model(url, key)
    except (OSError, ValueError) as error:
        print(f"No server answers at {url}: {error}. Start one with `make serve`.", file=sys.stderr)
        return 1
    terminal, messages = sys.stdout.isatty(), []
    while (line := ask()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        known: Answer | None = None
        try:
            known = asyncio.run(answer(url, key, {"model": model, "messages": messages, **options}, shower(terminal)))
        except KeyboardInterrupt:
            print(PLAIN if terminal else "", flush=True)
        except AnytimeError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        if known is None:
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": known.committed})
        print(f"\n{note(known, terminal)}", flush=True)
    return 0


def ask() -> str | None:
    """The next line of the input, None at its end."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        return input("> " if sys.stdin.isatty() else "")
    return None


def shower(terminal: bool) -> Callable[[Answer], None]:
    """What shows an answer as it grows: on a terminal with its tail, elsewhere only what is committed."""
    size = shutil.get_terminal_size()
    screen = Screen(sys.stdout.write, size.columns, size.lines)
    told = 0

    def show(known: Answer) -> None:
        nonlocal told
        new, told = known.committed[told:], len(known.committed)
        if not terminal:
            sys.stdout.write(new)
        else:
            if new:
                screen.settle(new)
            screen.show(known.provisional)
        sys.stdout.flush()

    return show


def note(known: Answer, terminal: bool) -> str:
    """One line about a finished answer."""
    done = known.done or {}
    depth = "" if done.get("depth") is None else f", mean depth {done['depth']:.2f}"
    left = f", {done['provisional']} provisional" if done.get("provisional") else ""
    text = f"[{done.get('committed', 0)} tokens{left}, {known.retracted} retracted{depth}, {done.get('finish_reason')}]"
    return f"{DIM}{text}{PLAIN}" if terminal else text
