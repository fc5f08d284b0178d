"""`ouro-vllm bench --exit`: quality and speed against mean depth, of fixed depths, the exit gate and two rivals.

Quality comes from a forward over held-out text and arithmetic that runs all loops (`policies`); speed from vLLM, for
what it serves: fixed depths and the gate, plainly and under self-speculation.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ouro_vllm import __version__
from ouro_vllm.bench import run
from ouro_vllm.bench.children import GRACE_SECONDS, WORKER, Child, stop_all
from ouro_vllm.bench.exits import curve
from ouro_vllm.bench.exits.policies import FIXED, GATE, quality, score_sums, score_text, settings
from ouro_vllm.bench.results import Results, finish, read, save
from ouro_vllm.evaluation import data
from ouro_vllm.evaluation.forward import Looped
from ouro_vllm.evaluation.policies import EvalError

SUMS = "sums"  # their series, see `evaluation.data.sums`
FLAGS = {FIXED: "ouro_loops", GATE: "ouro_exit_threshold"}  # what a request says to be served so


@dataclass(frozen=True)
class Plan:
    """What to measure.

    speed: of which model, for how long, at which batch size (the first), in which modes of `bench.modes`.
    text: file to measure the loss on, None for the bundled checkpoint's. text_tokens: most of it.
    sums: expressions per size. thresholds: q of the gate.
    """

    speed: run.Plan
    text: Path | None
    text_tokens: int
    sums: int
    thresholds: list[float]


def main(plan: Plan, results: Results) -> int:
    """Measure, print and write. Returns the exit status: 1 after saying what is wrong."""

    def steps() -> dict[str, Any]:
        prompts = run.read_prompts(plan.speed)
        figures = qualities(plan)
        save(figures, results.json)
        speeds(plan, prompts, figures)
        return figures

    return told(steps, results)


def redraw(source: Path, results: Results) -> int:
    """As `main`, with the figures that an earlier run wrote to `source`."""
    return told(lambda: read(source), results)


def told(steps: Callable[[], dict[str, Any]], results: Results) -> int:
    """Take figures from `steps`, then report them."""
    return finish(steps, results, curve.text, curve.for_readme, curve.draw)


def qualities(plan: Plan) -> dict[str, Any]:
    """Loss and accuracy of every policy at every setting."""
    folder = Path(plan.speed.model)
    tokens, forward = data.tokenizer(folder), Looped(folder)
    loops = forward.config.total_ut_steps
    ids = data.stream(tokens, plan.text, forward.config.vocab_size, plan.text_tokens)
    if len(ids) < 2:
        raise EvalError("The text has fewer than 2 tokens: raise --text-tokens, or name a longer --text.")
    text = score_text(forward, ids)
    print(f"held-out text: {text.loss.shape[1]} tokens read", flush=True)
    scored, chances = {}, {}
    for operators in range(1, data.corpus().LARGEST_TREE + 1):
        asked = data.sums(tokens, operators, plan.sums, SUMS)
        scored[operators], chances[str(operators)] = score_sums(forward, asked), data.commonest(asked)
    print(f"arithmetic: {plan.sums} expressions of each of {len(scored)} sizes read", flush=True)
    return {
        "model": folder.name,
        "loops": loops,
        "text_tokens": text.loss.shape[1],
        "sums": plan.sums,
        "chance": chances,
        "ouro_vllm": __version__,
        "policies": [quality(text, scored, *setting) for setting in settings(text, plan.thresholds)],
    }


def speeds(plan: Plan, prompts: list[str], figures: dict[str, Any]) -> None:
    """Adds to each served setting what vLLM does with it: {mode: {"rates": tokens/s per round, "mean_depth", ...}}.

    All settings in turn in each round; the round that warms up is not among them.

    Raises:
        BenchError: an engine did not start, failed or died.
    """
    speed, children = plan.speed, {}
    batch = speed.batches[0]
    served = [one for one in figures["policies"] if one["policy"] in FLAGS]
    with tempfile.TemporaryDirectory(prefix="ouro-vllm-bench-") as folder:
        try:
            for mode in speed.modes:
                print(f"{mode}: starting ...", flush=True)
                children[mode] = Child(mode, WORKER, run.child_environment(), Path(folder, f"{mode}.log"))
                facts = children[mode].ask({"start": run.start_message(speed, mode, prompts)})
            figures |= {name: facts[name] for name in ("vllm", "torch", "device", "threads")}
            figures |= {"dtype": speed.dtype, "batch": batch, "tokens": speed.tokens, "rounds": speed.rounds}
            for one in served:
                one["speed"] = {mode: {"rates": []} for mode in speed.modes}
            for number in range(speed.rounds + 1):
                for one in served:
                    for mode, child in children.items():
                        measure(speed, batch, child, one, one["speed"][mode], warm_up=number == 0)
                print(f"round {number} of {speed.rounds} done", flush=True)
        finally:
            stop_all(children.values(), GRACE_SECONDS)
    for one in served:
        for found in one["speed"].values():
            found["median"] = median(found["rates"])


def measure(
    speed: run.Plan, batch: int, child: Child, one: dict[str, Any], found: dict[str, Any], warm_up: bool
) -> None:
    """One setting in one engine, once. found: takes what it did."""
    asked = {FLAGS[one["policy"]]: one["setting"]}
    question = {"batch": batch, "requests": speed.requests(batch), "temperature": 0.0, "extra_args": asked}
    answer = child.ask({"measure": question})
    measured, read = answer["measurement"], answer["read"]
    if not warm_up:
        found["rates"].append(measured["tokens"] / measured["seconds"])
    found["mean_depth"] = sum(loop * count for loop, count in enumerate(read, 1)) / sum(read)
    if child.name == "wavefront":  # plain decoding's passes are not counted but known
        found["passes_per_token"] = measured["lane_passes"] / measured["committed"]
