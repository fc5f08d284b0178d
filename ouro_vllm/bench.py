"""`ouro-vllm bench`: how fast plain decoding is, modes against each other on this machine, in alternation.

Every mode is a server of its own; all are up at once and asked in turn (A B A B), so that what else the machine does
hits them alike; those not asked stand still meanwhile. Reported are medians with the spread, and the ratio to the first
mode.
"""

import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ouro_vllm.cpu import environment, serve_command
from ouro_vllm.server import HOST, NAME, Server, ServerError, events, free_port

MODES = {"eager": ["--enforce-eager"], "compiled": []}
START_SECONDS = 900.0
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def main(model: str, prompts: Path | None, options: "Options", json_file: Path | None, readme: Path | None) -> int:
    """Measure and print; write the figures to json_file and the table between the marks of readme.

    Returns the exit status: 1 after saying which input is missing or which server failed.
    """
    source = prompts or Path(model) / "prompts.json"
    if not source.is_file():
        print(f"{source} is not there: name a JSON list of prompts with --prompts FILE.", file=sys.stderr)
        return 1
    if readme is not None and BEGIN not in readme.read_text():
        print(f"{readme} has no line `{BEGIN}`: add it and `{END}` where the table is to stand.", file=sys.stderr)
        return 1
    try:
        figures = measure(model, json.loads(source.read_text()), options)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    text = report(figures)
    print(text)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if readme is not None:
        page = readme.read_text()
        readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}{END}", page, flags=re.DOTALL))
    return 0


class Options:
    """What to measure: batch sizes, rounds per mode and batch, tokens per answer."""

    def __init__(self, batches: list[int], rounds: int, tokens: int) -> None:
        self.batches, self.rounds, self.tokens = batches, rounds, tokens


def measure(model: str, prompts: list[str], options: Options) -> dict[str, Any]:
    """Start the servers, ask them in turn, stop them. Returns every single measurement beside what was asked for.

    Raises:
        ServerError: a server did not start or did not answer.
    """
    rates: dict[str, dict[int, list[float]]] = {mode: {size: [] for size in options.batches} for mode in MODES}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        # A cache of its own: the first start of a mode finds nothing compiled, the second finds what the first left.
        env = environment({**os.environ, "VLLM_CACHE_ROOT": folder})
        starts: dict[str, dict[str, float]] = {}
        servers = {}
        for mode, arguments in MODES.items():
            cold = start(model, arguments, env, Path(folder, f"{mode}-cold.log"), prompts[0])
            cold.server.stop()
            servers[mode] = start(model, arguments, env, Path(folder, f"{mode}.log"), prompts[0])
            stack.callback(servers[mode].server.stop)
            starts[mode] = {"cold": cold.seconds, "warm": servers[mode].seconds}
            print(f"{mode}: first answer after {cold.seconds:.0f} s, then {servers[mode].seconds:.0f} s", flush=True)
        for size in options.batches:
            asked = [prompts[i % len(prompts)] for i in range(size)]
            for count in range(options.rounds + 1):
                for mode, started in servers.items():
                    with others_paused(servers, mode):
                        rate = throughput(started.server.port, asked, options.tokens)
                    if count:  # the first round warms up
                        rates[mode][size].append(rate)
            print(f"batch {size}: done", flush=True)
    return {
        "model": Path(model).name,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "seconds_to_first_answer": starts,
        "tokens_per_second": rates,
    }


@contextlib.contextmanager
def others_paused(servers: dict[str, "Started"], mode: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name, started in servers.items():
            if name != mode:
                stack.enter_context(started.server.paused())
        yield


class Started:
    """A server that has answered once, and the seconds from its start to that answer."""

    def __init__(self, server: Server, seconds: float) -> None:
        self.server, self.seconds = server, seconds


def start(model: str, arguments: list[str], env: dict[str, str], log: Path, prompt: str) -> Started:
    port = free_port()
    command = serve_command(model, ["--host", HOST, "--port", str(port), "--served-model-name", NAME, *arguments])
    server, began = Server(command, port, log, env), time.monotonic()
    server.start()
    try:
        server.wait_healthy(START_SECONDS)
        answer_tokens(port, prompt, 1)
    except BaseException as error:
        server.stop()
        if isinstance(error, ServerError):
            raise ServerError(f"{error}\nThe last lines of its log:\n{server.last_lines()}") from error
        raise
    return Started(server, time.monotonic() - began)


def throughput(port: int, prompts: list[str], tokens: int) -> float:
    """Tokens per second of a batch of requests that start together, prompts included in the time."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        total = sum(pool.map(lambda prompt: answer_tokens(port, prompt, tokens), prompts))
    return total / (time.monotonic() - began)


def answer_tokens(port: int, prompt: str, tokens: int) -> int:
    """Ask for exactly `tokens` greedy tokens and wait for the last. Returns how many came, from the usage reported."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    usages = [event["usage"] for event in events(port, "/v1/completions", body) if event.get("usage")]
    return usages[-1]["completion_tokens"]


def report(figures: dict[str, Any]) -> str:
    """The figures of `measure` as Markdown."""
    base = next(iter(MODES))
    rows = [["mode", "batch", "tokens/s, median (least to most)", f"ratio to {base}"]]
    for mode, sizes in figures["tokens_per_second"].items():
        for size, values in sizes.items():
            middle = statistics.median(values)
            ratio = middle / statistics.median(figures["tokens_per_second"][base][size])
            rows.append([mode, str(size), f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})", f"{ratio:.2f}"])
    starts = [["mode", "seconds to the first answer, nothing compiled yet", "started again"]]
    starts += [[m, f"{s['cold']:.0f}", f"{s['warm']:.0f}"] for m, s in figures["seconds_to_first_answer"].items()]
    what = f"{figures['rounds']} rounds of {figures['tokens']} tokens per request, model {figures['model']}."
    return f"\n{markdown(rows)}\n{markdown(starts)}\n{what}\n"


def markdown(rows: Iterable[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
