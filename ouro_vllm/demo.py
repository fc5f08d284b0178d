"""`ouro-vllm demo`: a server for a moment. Starts it, waits until it is healthy, streams two answers, compares
the speed with and without drafting, stops it."""

import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_vllm.cpu import environment, serve_command
from ouro_vllm.names import SPECULATIVE_CONFIG
from ouro_vllm.server import GRACE_SECONDS, HOST, NAME, Server, ServerError, events, free_port

PROMPT = "def read_config(filename, encoding=None):\n"
QUESTION = "Evaluate modulo 5: + 3 4"
# How long vLLM gives its engine to end by itself; it kills it at once otherwise.
ENGINE_SECONDS = 10
# Fewer tokens than this after the first say nothing about speed.
FEWEST_TIMED = 8
# Requests of each kind, and tokens of each, when drafting is compared with none.
COMPARED, COMPARED_TOKENS = 5, 96


@dataclass
class Answer:
    """A streamed answer as it was seen here. Times are those of `time.monotonic`."""

    tokens: int
    first: float
    last: float

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token; None where there are too few to tell."""
        after = self.tokens - 1
        return after / (self.last - self.first) if after >= FEWEST_TIMED and self.last > self.first else None

    def __str__(self) -> str:
        speed = "" if self.rate is None else f", {self.rate:.1f} tokens/s after the first"
        return f"{self.tokens} tokens{speed}"


def ask(port: int, path: str, body: dict[str, Any]) -> Answer:
    """Post `body` as a streamed request and write the answer to stdout as it arrives.

    Raises:
        ServerError: the server refused, reported an error, or the answer broke off.
    """
    body = {**body, "model": NAME, "stream": True, "stream_options": {"include_usage": True}}
    first = last = None
    tokens = 0
    for event in events(port, path, body):
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
        if text := "".join(text_of(choice) for choice in event.get("choices", ())):
            last = time.monotonic()
            first = first or last
            sys.stdout.write(text)
            sys.stdout.flush()
    now = time.monotonic()
    return Answer(tokens, first or now, last or now)


def compared(port: int, prompt: str) -> str:
    """The same request with and without drafting, in alternation: what to say about their speed and their words."""
    times: dict[int, list[float]] = {0: [], 1: []}
    texts: dict[int, str] = {}
    for number in range(COMPARED + 1):
        for speculate in times:
            options = {"max_tokens": COMPARED_TOKENS, "temperature": 0, "ignore_eos": True}
            body = {"prompt": prompt, "model": NAME, "stream": True, "vllm_xargs": {"ouro_speculate": speculate}}
            began = time.monotonic()
            pieces = [text_of(c) for event in events(port, "/v1/completions", body | options) for c in event["choices"]]
            texts[speculate] = "".join(pieces)
            if number:  # the first of each warms up
                times[speculate].append(time.monotonic() - began)
    without, drafted = (statistics.median(times[speculate]) for speculate in times)
    same = "the same words" if texts[0] == texts[1] else "other words (possible in bfloat16, at a near-tie)"
    return (
        f"{COMPARED_TOKENS} tokens drafted by early loops: {drafted:.2f} s; without drafting: {without:.2f} s. "
        f"{without / drafted:.1f} times as fast, {same} (medians of {COMPARED} each, in alternation, one server)."
    )


def text_of(choice: dict[str, Any]) -> str:
    """The new text of a streamed choice, of a completion or of a chat."""
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def main(model: str, prompt: str, question: str, max_tokens: int, timeout: float, serve_args: list[str]) -> int:
    """The demonstration with vLLM's own server. Returns 0, or 1 after saying what went wrong.

    prompt is continued, question is asked as a chat; serve_args are further arguments of `vllm serve`.
    """
    if looks_like_folder(model) and not Path(model, "config.json").is_file():
        print(f"{model} holds no config.json: name a checkpoint's folder, or its name on a model hub.", file=sys.stderr)
        return 1
    port = free_port()
    options = ["--host", HOST, "--port", str(port), "--served-model-name", NAME]
    if not any(argument.startswith("--speculative-config") for argument in serve_args):
        options += ["--speculative-config", SPECULATIVE_CONFIG]
    command = serve_command(model, [*options, "--shutdown-timeout", str(ENGINE_SECONDS), *serve_args])
    handle, log = tempfile.mkstemp(prefix="ouro-vllm-demo-", suffix=".log")
    os.close(handle)
    print(f"$ {shlex.join(command)}\nserver log: {log}", flush=True)
    server = Server(command, port, Path(log), environment(os.environ, serve_args))
    return demonstrate(server, prompt, question, max_tokens, timeout)


def looks_like_folder(model: str) -> bool:
    """Whether `model` is written as a path, or is one, rather than as `owner/name` of a model hub."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def demonstrate(
    server: Server, prompt: str, question: str, max_tokens: int, timeout: float, grace: float = GRACE_SECONDS
) -> int:
    """Start `server`, ask, report, and stop it whatever happens. Returns the exit status.

    Raises:
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, the server having been stopped.
    """
    before = signal.signal(signal.SIGTERM, leave)
    began = time.monotonic()
    try:
        server.start()
        print("Starting (vLLM compiles the model the first time) ...", flush=True)
        server.wait_healthy(timeout)
        print(f"Ready after {time.monotonic() - began:.1f} s.", flush=True)
        options = {"max_tokens": max_tokens, "temperature": 0}
        answers = []
        for title, shown, path, body in (
            ("The model continues a text", prompt, "/v1/completions", {"prompt": prompt}),
            ("The model is asked", question + "\n", "/v1/chat/completions", {"messages": as_chat(question)}),
        ):
            print(f"\n--- {title}\n{shown}", end="", flush=True)
            answers.append(ask(server.port, path, body | options))
            print(f"\n--- {answers[-1]}", flush=True)
        print(f"\nFrom start to the first answer: {answers[0].first - began:.1f} s.", flush=True)
        print(compared(server.port, prompt), flush=True)
        return 0
    except ServerError as error:
        print(f"\n{error}\nThe last lines of {server.log}:\n{server.last_lines()}", file=sys.stderr)
        print("`ouro-vllm doctor MODEL` looks for the cause.", file=sys.stderr)
        return 1
    finally:
        print("Stopping the server (Ctrl-C kills it at once) ...", flush=True)
        server.stop(grace)
        signal.signal(signal.SIGTERM, before)


def as_chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def leave(number: int, _frame: Any) -> None:
    """Signal handler: leave by way of every `finally`."""
    sys.exit(128 + number)
