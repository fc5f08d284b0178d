"""Measures what sharing the KV cache across loops costs: loss and agreement on text, accuracy on sums."""

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_vllm import __version__
from ouro_vllm.bench.results import Results, finish, read
from ouro_vllm.evaluation import data, report
from ouro_vllm.evaluation.forward import Cache, Looped, follow
from ouro_vllm.evaluation.policies import BASE, EvalError, Setting

LARGEST_SUM = 4  # operators; the bundled checkpoint is at chance beyond
CACHE_BYTES = 2**30  # of KV at once, which bounds how many sequences are run together
MOST_SEQUENCES = 64  # together, however short


@dataclass(frozen=True)
class Plan:
    """What to measure.

    model: a checkpoint's folder. policies, windows: every policy at every window; BASE is measured once, in any case.
    block: see `Setting`. sequences of `tokens` tokens each, the first `prompt` of which are a prompt; the rest counts
    as generated. sums: how many of each size. text: a file instead of the held-out text.
    """

    model: Path
    policies: list[str]
    windows: list[int]
    block: int = 1
    sequences: int = 64
    tokens: int = 512
    prompt: int = 256
    sums: int = 300
    text: Path | None = None

    @property
    def settings(self) -> list[Setting]:
        """BASE first. Raises EvalError as `Setting` does."""
        shared = [Setting(policy, window, self.block) for policy in self.policies for window in self.windows]
        return [Setting(BASE), *dict.fromkeys(one for one in shared if one.shares)]


def main(plan: Plan, results: Results) -> int:
    """Measure, print and write. Returns the exit status: 1 after saying which input is wrong."""
    return told(lambda: measure(plan, lambda said: print(said, flush=True)), results)


def redraw(source: Path, results: Results) -> int:
    """As `main`, with the figures that an earlier run wrote to `source`."""
    return told(lambda: read(source), results)


def told(steps: Callable[[], dict[str, Any]], results: Results) -> int:
    """Take figures from `steps`, then report them."""
    return finish(steps, results, lambda figures: f"\n{report.text(figures)}", report.text)


@torch.inference_mode()
def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """-> the figures, as JSON has them. say: takes lines on the progress.

    Raises:
        EvalError: an input is missing, unknown or too short; the model has a single loop.
        CheckpointError: the weights do not fit the configuration.
    """
    began = time.monotonic()
    settings = plan.settings
    check(plan)
    model, tokens = Looped(plan.model), data.tokenizer(plan.model)
    check_model(plan, model)
    stream = data.stream(tokens, plan.text, model.config.vocab_size)
    ids = data.windows(stream, plan.sequences, plan.tokens)
    asked = {size: data.sums(tokens, size, plan.sums) for size in range(1, LARGEST_SUM + 1)} if plan.sums else {}
    figures = heading(plan, model)
    scores = read_text(model, ids, plan.prompt, settings, say)
    hits = {size: answer_sums(model, some, settings) for size, some in asked.items()}
    if asked:
        say(f"sums: {plan.sums} of each size answered")
    figures["chance"] = [data.commonest(some) for some in asked.values()]
    figures["settings"] = [
        {
            "policy": one.policy,
            "window": one.window if one.shares else None,
            **on_text(scores[one], scores[settings[0]]),
            "sums": [on_sums(size, hit[one], hit[settings[0]]) for size, hit in hits.items()],
        }
        for one in settings
    ]
    figures["seconds"] = round(time.monotonic() - began)
    return figures


def check(plan: Plan) -> None:
    """Raises EvalError for lengths that leave nothing to measure."""
    if plan.tokens < 2:
        raise EvalError(f"--tokens {plan.tokens}: name 2 or more, one at least for the prompt and one behind it.")
    if not 1 <= plan.prompt < plan.tokens:
        raise EvalError(f"--prompt {plan.prompt}: name 1 to {plan.tokens - 1}, fewer than --tokens {plan.tokens}.")


def check_model(plan: Plan, model: Looped) -> None:
    """Raises EvalError for a model that has nothing to share or no such positions."""
    if model.config.total_ut_steps == 1:
        raise EvalError(f"{plan.model} has a single loop (`total_ut_steps` 1): there is no KV for loops to share.")
    if plan.tokens > (most := model.config.max_position_embeddings):
        raise EvalError(f"--tokens {plan.tokens}: the model has {most} positions (`max_position_embeddings`).")


def heading(plan: Plan, model: Looped) -> dict[str, Any]:
    """What the figures are of."""
    return {
        "model": plan.model.resolve().name,
        "loops": model.config.total_ut_steps,
        "block": plan.block,
        "sequences": plan.sequences,
        "tokens": plan.tokens,
        "prompt": plan.prompt,
        "sums": plan.sums,
        "text": plan.text.name if plan.text else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ouro_vllm": __version__,
    }


def together(model: Looped, ids: Tensor) -> Iterator[Tensor]:
    """ids [B, T] in pieces of so many sequences as CACHE_BYTES have room for, one at least."""
    config = model.config
    entries = 2 * config.total_ut_steps * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    yield from ids.split(max(1, min(MOST_SEQUENCES, CACHE_BYTES // (4 * entries * ids.shape[1]))))


def runs(model: Looped, ids: Tensor, prompt: int, settings: list[Setting]) -> Iterator[tuple[Setting, Tensor]]:
    """ids [B, T] under each setting -> hidden states [B, T - prompt, D]. The prompt, the same for all, is read once."""
    cache = Cache(model.config, *ids.shape)
    model.extend(ids[:, :prompt], cache)
    for one in settings:
        yield one, follow(model, ids, cache, prompt, one)


@dataclass(frozen=True)
class Scores:
    """Of what generated rows say about their next token. Both [B, T - prompt]."""

    loss: Tensor  # nats
    top: Tensor  # most likely token


def read_text(
    model: Looped, ids: Tensor, prompt: int, settings: list[Setting], say: Callable[[str], None]
) -> dict[Setting, Scores]:
    """ids [B, T + 1], each sequence with the token after its last."""
    pieces: dict[Setting, list[Scores]] = defaultdict(list)
    done = 0
    for some in together(model, ids):
        for one, hidden in runs(model, some[:, :-1], prompt, settings):
            pieces[one].append(score(model, hidden, some[:, prompt + 1 :]))
            name = f"{one.policy}, window {one.window}" if one.shares else one.policy
            say(f"text: sequences {done + 1} to {done + len(some)} of {len(ids)}, {name}: read")
        done += len(some)
    return {
        one: Scores(torch.cat([part.loss for part in parts]), torch.cat([part.top for part in parts]))
        for one, parts in pieces.items()
    }


def score(model: Looped, hidden: Tensor, targets: Tensor) -> Scores:
    """hidden [B, c, D], targets [B, c]; never all logits at once."""
    loss, top = [], []
    for rows, right in zip(hidden, targets, strict=True):
        logits = model.logits(rows)
        loss.append(F.cross_entropy(logits, right, reduction="none"))
        top.append(logits.argmax(-1))
    return Scores(torch.stack(loss), torch.stack(top))


def answer_sums(model: Looped, asked: list[data.Sum], settings: list[Setting]) -> dict[Setting, Tensor]:
    """-> for each setting, whether each sum's greedy answer, one token, is right: [sums] of 0 and 1."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, one in enumerate(asked):
        alike[one.prompt, len(one.ids)].append(number)
    hits = {one: torch.empty(len(asked)) for one in settings}
    for (prompt, _), numbers in alike.items():
        ids = torch.tensor([asked[number].ids for number in numbers])
        answers = torch.tensor([asked[number].answer for number in numbers])
        for one, hidden in runs(model, ids, prompt, settings):
            hits[one][torch.tensor(numbers)] = (model.logits(hidden[:, -1]).argmax(-1) == answers).float()
    return hits


def on_text(scores: Scores, base: Scores) -> dict[str, Any]:
    """Loss, what it is above the base's, and how often the most likely token is the base's."""
    loss = scores.loss.double().mean(1)
    return {
        "loss": mean(loss),
        "cost": mean(loss - base.loss.double().mean(1)),
        "agreement": mean((scores.top == base.top).double().mean(1)),
        "loss_by_sequence": [round(value, 5) for value in loss.tolist()],
    }


def on_sums(operators: int, hits: Tensor, base: Tensor) -> dict[str, Any]:
    """Accuracy on sums of one size and its difference to the base's, sum by sum."""
    return {"operators": operators, "accuracy": mean(hits.double()), "difference": mean((hits - base).double())}


def mean(values: Tensor) -> dict[str, float | None]:
    """Of independent values [n], with its standard error (None of one alone).

    Tokens of one sequence are not independent, sequences are: so text comes as a mean per sequence. Differences are
    taken pair by pair first, which leaves out what makes one sequence harder than another.
    """
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": values.mean().item(), "error": error}
