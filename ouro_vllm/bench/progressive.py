"""How soon a whole draft stands, beside the whole answer: `python -m ouro_vllm.bench.progressive` on a running server.

Three requests in turn, the same text: plain (no drafting, all loops for every token), drafted (what the server does by
itself), progressive. One at a time, so nothing else may use the server meanwhile.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field

from ouro_vllm.anytime import Answer, AnytimeError, events
from ouro_vllm.chat import served_model
from ouro_vllm.demo import PROMPT


@dataclass
class Times:
    """Seconds from the request on, one per round. draft: until the draft is complete; answer: until all is done."""

    draft: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)


async def timed(url: str, key: str | None, body: dict, times: Times) -> Answer:
    """Ask once and note when. Raises AnytimeError."""
    known, began = Answer(), time.perf_counter()
    async for event in events(url, body, key):
        known.feed(event)
        if event.get("complete"):
            times.draft.append(time.perf_counter() - began)
    times.answer.append(time.perf_counter() - began)
    return known


async def measure(url: str, key: str | None, prompt: str, tokens: int, rounds: int) -> dict:
    """Medians of `rounds` rounds after one that warms up. Raises AnytimeError, and OSError where no server answers."""
    common = {"model": served_model(url, key), "prompt": prompt, "max_tokens": tokens}
    common |= {"temperature": 0, "ignore_eos": True}
    bodies = {
        "plain": {**common, "vllm_xargs": {"ouro_speculate": 0}},
        "drafted": common,
        "progressive": {**common, "anytime": {"mode": "progressive"}},
    }
    times, answers = {name: Times() for name in bodies}, {}
    for number in range(rounds + 1):
        for name, body in bodies.items():
            answers[name] = await timed(url, key, body, times[name] if number else Times())
    ratios = [draft / whole for draft, whole in zip(times["progressive"].draft, times["plain"].answer, strict=True)]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "seconds": {name: statistics.median(of.answer) for name, of in times.items()},
        "seconds_draft": statistics.median(times["progressive"].draft),
        "ratio_draft_to_plain": statistics.median(ratios),
        "ratio_least_to_most": [min(ratios), max(ratios)],
        "same_answer": len({answer.committed for answer in answers.values()}) == 1,
        "retracted": answers["progressive"].retracted,
    }


def main() -> int:
    """Returns 0, or 1 after saying what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m ouro_vllm.bench.progressive", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API (default: %(default)s)")
    parser.add_argument("--api-key", help="the server's API key")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue (default: the head of a Python function)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that warms up (default: %(default)s)")
    args = parser.parse_args()
    try:
        found = asyncio.run(measure(args.url.rstrip("/"), args.api_key, args.prompt, args.tokens, args.rounds))
    except (AnytimeError, OSError, ValueError) as error:
        print(f"{args.url}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
