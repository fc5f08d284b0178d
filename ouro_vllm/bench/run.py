"""Conducts a benchmark: starts the engines, asks them in turn, writes down what they measured."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_vllm import __version__
from ouro_vllm.bench import report
from ouro_vllm.bench.children import GRACE_SECONDS, WORKER, BenchError, Child, stop_all
from ouro_vllm.bench.figures import PROJECTION, Measurement, as_json, summaries
from ouro_vllm.bench.modes import ASKED, BASE, engine_options, method, speculative
from ouro_vllm.bench.results import Results, finish, read, save
from ouro_vllm.cpu import KV_SPACE, environment, is_cpu_build
from ouro_vllm.demo import looks_like_folder
from ouro_vllm.sharing import AVERAGE
from ouro_vllm.speculation import MOST_PASSES

FEWEST_REQUESTS = 6
# Of a measurement, the modes in turn. What slows a machine down lasts from a tenth of a second to minutes; with shorter
# parts more of the time goes into caches that another engine's turn left cold.
PARTS = 8
SERIES = {"greedy": 0.0, "sampled": 0.7}  # temperature; every request has a seed of its own


@dataclass(frozen=True)
class Plan:
    """What to measure.

    model: folder or name. prompts: file with a JSON list of texts, None for the model's own.
    modes: of `modes.MODES`. batches: most requests at once, rising. starts: how often engines are started anew, since
    one process can be faster than the next of its kind throughout, by where its memory lies. rounds: measurements per
    start, mode and batch size, after one that warms up. tokens: per answer, on average. turns: requests per place in
    the batch, FEWEST_REQUESTS at least in all; count: instead of these, how many in all at every batch size that is no
    larger. passes, drafts, window: see `modes.engine_options`. sampled: the second of SERIES too. flat_rows: see
    `figures.PROJECTION`. context: tokens per prompt, cut from all texts in a row; None for the prompts as they are.
    """

    model: str
    prompts: Path | None
    modes: list[str]
    batches: list[int]
    starts: int
    rounds: int
    tokens: int
    turns: int
    passes: int
    drafts: int
    dtype: str
    sampled: bool
    flat_rows: int
    window: int = 256
    context: int | None = None
    count: int | None = None

    def requests(self, batch: int) -> int:
        """How many are answered in one measurement."""
        return max(self.count or max(FEWEST_REQUESTS, self.turns * batch), batch)


def main(plan: Plan, results: Results) -> int:
    """Measure, print and write. Returns the exit status: 1 after saying which input is wrong or which engine failed."""

    def steps() -> dict[str, Any]:
        # After every batch size, so that a run that is cut short leaves what it measured.
        return measure(plan, read_prompts(plan), lambda figures: save(figures, results.json))

    return told(steps, plan.flat_rows, results)


def redraw(source: Path, flat_rows: int, results: Results) -> int:
    """As `main`, with the figures that an earlier run wrote to `source`."""
    return told(lambda: read(source), flat_rows, results)


def told(steps: Callable[[], dict[str, Any]], flat_rows: int, results: Results) -> int:
    """Take figures from `steps`, then report them."""

    def text(figures: dict[str, Any]) -> str:
        summarise(figures, flat_rows)
        return report.text(figures)

    return finish(steps, results, text, report.for_readme, report.draw)


def read_prompts(plan: Plan) -> list[str]:
    """The texts. Raises BenchError where the model or they are missing, or the plan asks too much of vLLM."""
    for name in ("passes", "drafts"):
        if getattr(plan, name) > MOST_PASSES:
            raise BenchError(f"--{name} {getattr(plan, name)}: vLLM takes no more than {MOST_PASSES} per step.")
    if looks_like_folder(plan.model) and not Path(plan.model, "config.json").is_file():
        raise BenchError(f"{plan.model} holds no config.json: name a checkpoint's folder, or its name on a model hub.")
    source = plan.prompts or Path(plan.model, "prompts.json")
    if not source.is_file():
        raise BenchError(f"{source} is not there: name a JSON list of prompts with --prompts FILE.")
    try:
        prompts = json.loads(source.read_text())
    except ValueError as error:
        raise BenchError(f"{source} is not JSON: {error}") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
        raise BenchError(f"{source} must be a JSON list of texts, at least one and none empty.")
    return prompts


def child_environment() -> dict[str, str]:
    """What a worker starts with: as a server's, but for the engine in the process itself."""
    env = {**environment(os.environ), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if is_cpu_build():
        # It would overrule the size that the worker computes.
        env.pop(KV_SPACE, None)
        # What vLLM gives to the worker processes of a server (vllm/utils/ompmultiprocessing.py). There it sets one core
        # aside for the engine core, which here shares the process.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for name, value in (("OMP_NUM_THREADS", str(cores)), ("KMP_BLOCKTIME", "5"), ("KMP_TPAUSE", "0")):
            env.setdefault(name, value)
    return env


def measure(plan: Plan, prompts: list[str], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Start the engines, ask them in turn, stop them whatever happens; `plan.starts` times, all rounds in one.

    keep: takes the figures so far.

    Raises:
        BenchError: an engine did not start, failed or died.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, the engines having been stopped.
    """
    figures: dict[str, Any] = {}
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for start in range(1, plan.starts + 1):
            if plan.starts > 1:
                print(f"start {start} of {plan.starts}", flush=True)
            children: dict[str, Child] = {}
            with tempfile.TemporaryDirectory(prefix="ouro-vllm-bench-") as folder:
                try:
                    facts = start_all(plan, prompts, children, Path(folder))
                    figures = figures or heading(plan, facts)
                    figures["starts"] = start
                    ask_all(plan, children, figures, keep)
                finally:
                    stop_all(children.values(), GRACE_SECONDS)
        return figures
    finally:
        signal.signal(signal.SIGTERM, before)


def start_all(plan: Plan, prompts: list[str], children: dict[str, Child], folder: Path) -> dict[str, dict[str, Any]]:
    """Start an engine per mode; returns what each says of itself. children: filled in, that they can be stopped if one
    does not start. folder: takes their logs."""
    facts = {}
    for mode in plan.modes:
        print(f"{mode}: starting (vLLM compiles the model the first time) ...", flush=True)
        children[mode] = Child(mode, WORKER, child_environment(), folder / f"{mode}.log")
        facts[mode] = children[mode].ask({"start": start_message(plan, mode, prompts)})
        print(f"{mode}: ready after {facts[mode]['start_seconds']:.0f} s", flush=True)
    return facts


def ask_all(
    plan: Plan, children: dict[str, Child], figures: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Everything to be measured after one start, added to `figures`, with all summaries worked out anew.

    keep: takes the figures after every batch size.
    """
    for series, temperature in SERIES.items():
        if series == "greedy" or plan.sampled:
            reference: list[list[int]] = []
            modes = figures["series"].setdefault(series, {mode: {} for mode in plan.modes})
            for batch in plan.batches:
                cells = alternate(plan, children, batch, temperature, reference)
                for mode, rounds in cells.items():
                    cell = modes[mode].setdefault(str(batch), {"rounds": []})
                    cell["rounds"] += [as_json(one) for one in rounds]
                summarise(figures, plan.flat_rows)
                keep(figures)


def start_message(plan: Plan, mode: str, prompts: list[str]) -> dict[str, Any]:
    """Arguments of `worker.Engine`."""
    # Drafts that are scheduled, and as many passes and some loops that rows may run ahead: more than any mode takes.
    lookahead = 2 * max(plan.passes, plan.drafts) + 16
    return {
        "model": plan.model,
        "prompts": prompts,
        "tokens": plan.tokens,
        "batch": max(plan.batches),
        "lookahead": lookahead if any(map(speculative, plan.modes)) else 0,
        "dtype": plan.dtype,
        "context": plan.context,
        # The mean over loops is a cache of its own.
        "more_groups": int(any(name.endswith(f"+{AVERAGE}") for name in plan.modes)),
        "options": engine_options(mode, plan.passes, plan.drafts, plan.window),
    }


def alternate(
    plan: Plan, children: dict[str, Child], batch: int, temperature: float, reference: list[list[int]]
) -> dict[str, list[Measurement]]:
    """All rounds at one batch size, but the one that warms up.

    reference: plain's first answers of the series since the start, filled in here at the smallest batch size. Plain is
    compared with these, which shows what batching alone changes; the others with plain in the same round.
    """
    order = sorted(plan.modes, key=lambda mode: mode != BASE)
    rounds: dict[str, list[Measurement]] = {mode: [] for mode in order}
    question = {"batch": batch, "requests": plan.requests(batch), "temperature": temperature, "parts": PARTS}
    asked = {mode: {"extra_args": ASKED[method(mode)]} if method(mode) in ASKED else {} for mode in order}
    questions = {mode: {"measure": {**question, **asked[mode]}} for mode in order}
    for number in range(plan.rounds + 1):
        answers = in_turn(children, questions)
        base, said = answers[BASE]["outputs"], []
        reference += [] if reference else base
        for mode in order:
            one = Measurement(**answers[mode]["measurement"])
            one.compare(answers[mode]["outputs"], reference if mode == BASE else base)
            if number:
                rounds[mode].append(one)
            said.append(f"{mode} {one.rate:.1f}")
        name = f"round {number} of {plan.rounds}" if number else "warm-up"
        print(f"batch {batch}, temperature {temperature:g}, {name}: {', '.join(said)} tokens/s", flush=True)
    return rounds


def in_turn(children: dict[str, Child], questions: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The children's answers. They work on them in parts, one at a time, always in the same order: whoever went on
    after its own part would find its caches warm."""
    answers = {mode: children[mode].ask(question) for mode, question in questions.items()}
    while under_way := [mode for mode, answer in answers.items() if "measurement" not in answer]:
        answers |= {mode: children[mode].ask({"go_on": {}}) for mode in under_way}
    return answers


def heading(plan: Plan, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the figures are of; `series` is still empty. facts: of the first start."""
    base = facts[BASE]
    return {
        "model": Path(plan.model).name,
        "dtype": plan.dtype,
        "loops": base["loops"],
        "rounds": plan.rounds,
        "parts": PARTS,
        "tokens": plan.tokens,
        "requests": {str(batch): plan.requests(batch) for batch in plan.batches},
        "prompts": len(base["prompt_tokens"]),
        "prompt_tokens": {"least": min(base["prompt_tokens"]), "most": max(base["prompt_tokens"])},
        "passes": plan.passes,
        "drafts": plan.drafts,
        "kv_window": plan.window,
        "ouro_vllm": __version__,
        **{name: base[name] for name in ("vllm", "torch", "device", "threads", "kv_gib")},
        "start_seconds": {mode: fact["start_seconds"] for mode, fact in facts.items()},
        "series": {},
    }


def summarise(figures: dict[str, Any], flat_rows: int) -> None:
    """Work out all summaries, anew where there are some."""
    figures["projection"] = {"flat_rows": flat_rows, "what": PROJECTION}
    for series in figures["series"].values():
        summaries(series, BASE, figures["loops"], flat_rows)
