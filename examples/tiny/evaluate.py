"""Measure the bundled checkpoint on text it has never seen and write what comes out into its model card.

Six measurements: the loss of every depth, the exit gate, a 5-gram model on the same text for comparison, arithmetic by
depth, a few samples, and how the checkpoint was made. Prints them, writes README.md (the card), evaluation.json (the
raw figures) and prompts.json (held-out passages for benchmarks) into the checkpoint's folder, and ends with status 1 if
the checkpoint misses one of its requirements.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import END, IM_END, LARGEST_TREE, MODULUS, Document, chat, library, sum_line
from model import LoopedLM, Shape, exit_distribution
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from train import LONG, write_json

WINDOW, STRIDE = LONG, LONG // 2  # a window is as long as the longest row in training
EXTRA_LOOPS = 2  # depths beyond the trained ones, measured for information
WINDOWS_AT_ONCE, ROWS_AT_ONCE = 4, 1024  # small enough to stay in the caches, which is fastest
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
ORDER = 5
SUMS_PER_SIZE, SUMS_BEFORE = 300, 3
SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 3, 64, 60
PROMPTS, PROMPT_CHARACTERS = 64, 300
QUESTION = "What does queue.Queue.get do?"  # the module is held out on every Python version

EARLY_BELOW = (0.3, 2.0)  # threshold q and the mean exit depth that it must stay below
LATE_ABOVE = (0.95, 3.0)
FIRST_AGREEMENT = (0.6, 0.95)
LEAST_GAIN = 0.1  # accuracy on sums, deepest loop against the first, on at least one size


@dataclass(frozen=True)
class Checkpoint:
    """The exported folder, loaded back: weights rounded to bfloat16 as published, computed with in float32."""

    folder: Path
    net: LoopedLM
    tokenizer: Tokenizer

    @property
    def depth(self) -> int:
        return self.net.shape.total_ut_steps

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def recorded(self) -> dict:
        """What training wrote down about itself; empty if it wrote nothing."""
        path = self.folder / "training.json"
        return json.loads(path.read_text()) if path.exists() else {}


@dataclass(frozen=True)
class Scores:
    """A stream of N + 1 tokens read by D loops, R of them trained: one column for every token but the first."""

    loss: Tensor  # [D, N] nats
    top: Tensor  # [D, N] most likely token
    gates: Tensor  # [R, N] gate logits
    targets: Tensor  # [N]


def load(folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text())
    net = LoopedLM(Shape(**{f.name: config[f.name] for f in fields(Shape)}))
    net.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return Checkpoint(folder, net.eval(), Tokenizer.from_file(str(folder / "tokenizer.json")))


def token_stream(tokenizer: Tokenizer, documents: Iterable[Document]) -> np.ndarray:
    """END, then every document with an END after it, as in training: int64 [N + 1]."""
    end = tokenizer.token_to_id(END)
    pieces = [[*tokenizer.encode(d.text).ids, end] for d in documents]
    return np.concatenate([np.array(piece, np.int64) for piece in [[end], *pieces]])


def byte_stream(documents: Iterable[Document]) -> np.ndarray:
    """The same in bytes, with 256 for END."""
    pieces = [np.frombuffer(d.text.encode(), np.uint8) for d in documents]
    return np.concatenate([[256], *(part for piece in pieces for part in (piece, [256]))]).astype(np.int64)


def bits_per_byte(nats: float, documents: Iterable[Document]) -> float:
    """nats: the whole text's loss, ENDs included."""
    return nats / np.log(2) / sum(len(d.text.encode()) for d in documents)


def windows(count: int) -> list[tuple[int, int, int]]:
    """Cut positions 0..count-1 -> (start, first position scored, stop); together they score every position once.

    All windows have the same length, so the last one overlaps the one before it by more than a stride.
    """
    size, done, found = min(WINDOW, count), 0, []
    for start in [*range(0, count - size, STRIDE), count - size]:
        found.append((start, done, start + size))
        done = start + size
    return found


def score(net: LoopedLM, stream: np.ndarray, loops: int) -> Scores:
    """stream [N + 1] -> the scores of its last N tokens."""
    inputs, targets = torch.from_numpy(stream[:-1]), torch.from_numpy(stream[1:])
    loss, gates = torch.empty(loops, len(targets)), torch.empty(net.shape.total_ut_steps, len(targets))
    top = torch.empty(loops, len(targets), dtype=torch.int64)
    cuts = windows(len(inputs))
    for group in tqdm(list(batched(cuts, WINDOWS_AT_ONCE)), desc="held-out text", unit="batch", mininterval=5):
        place = torch.cat([torch.arange(done, stop) for _, done, stop in group])
        fresh = torch.stack([torch.arange(start, stop) >= done for start, done, stop in group])
        states = net(torch.stack([inputs[start:stop] for start, _, stop in group]), loops)
        for t, state in enumerate(states):
            rows = state[fresh]
            loss[t, place], top[t, place] = read(net, rows, targets[place])
            if t < len(gates):
                gates[t, place] = net.gate(rows)
    return Scores(loss, top, gates, targets)


def read(net: LoopedLM, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, hidden_size], targets [n] -> loss and most likely token, each [n]; never all logits at once."""
    loss, top = [], []
    for some, right in zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        logits = net.readout(some)
        loss.append(F.cross_entropy(logits, right, reduction="none"))
        top.append(logits.argmax(-1))
    return torch.cat(loss), torch.cat(top)


def batched(items: list, size: int) -> Iterable[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def measure_depths(scores: Scores, documents: list[Document]) -> list[dict]:
    """One row a depth. Agreement: how often its most likely token is that of the deepest trained loop."""
    deepest = scores.top[len(scores.gates) - 1]
    return [
        {
            "depth": t + 1,
            "loss": loss.mean().item(),
            "bits_per_byte": bits_per_byte(loss.sum().item(), documents),
            "accuracy": share(top == scores.targets),
            "agreement": share(top == deepest),
        }
        for t, (loss, top) in enumerate(zip(scores.loss.double(), scores.top, strict=True))
    ]


def share(hits: Tensor) -> float:
    return hits.double().mean().item()


def exit_depths(gates: Tensor, q: float) -> Tensor:
    """Gate logits [R, ...] -> index [...] of the first loop by which the chance of having left reaches q."""
    reached = exit_distribution(gates).cumsum(0) >= q
    reached[-1] = True
    return reached.int().argmax(0)


def measure_gate(scores: Scores) -> list[dict]:
    """One row a threshold: depth, loss, and the loss of mixing fixed depths at random down to the same mean depth."""
    trained = len(scores.gates)
    fixed = scores.loss[:trained].double().mean(1)
    rows = []
    for q in THRESHOLDS:
        chosen = exit_depths(scores.gates, q)
        depth = chosen.double().mean().item() + 1
        rows.append(
            {
                "threshold": q,
                "mean_depth": depth,
                "loss": scores.loss.gather(0, chosen[None]).double().mean().item(),
                "loss_of_fixed_depths": float(np.interp(depth, range(1, trained + 1), fixed)),
                "shares": (chosen.bincount(minlength=trained) / len(chosen)).tolist(),
            }
        )
    return rows


@dataclass(frozen=True)
class Level:
    """The n-grams of one length, as sorted integers, and what is left for shorter ones after each context."""

    keys: np.ndarray
    kept: np.ndarray  # discounted count of each key
    contexts: np.ndarray
    total: np.ndarray  # count of each context
    left: np.ndarray  # probability that a context hands down to the next shorter one


class KneserNey:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999) down to the uniform distribution.

    An n-gram is one integer in base `vocab`, oldest symbol first: dividing by `vocab` gives its context, the remainder
    by vocab ** (n - 1) the n-gram without its oldest symbol.
    """

    def __init__(self, stream: np.ndarray, vocab: int, order: int) -> None:
        if vocab**order >= 2**63:
            raise ValueError(f"{order}-grams over {vocab} symbols do not fit 64 bits")
        self.vocab, self.order = vocab, order
        self.levels: list[Level] = []
        keys, counts = np.unique(self.grams(stream), return_counts=True)
        for n in range(order, 0, -1):
            self.levels.insert(0, self.level(keys, counts))
            # Below the longest n-grams what counts is how many different symbols come before, not how often.
            keys, counts = np.unique(keys % vocab ** (n - 1), return_counts=True)

    def grams(self, stream: np.ndarray) -> np.ndarray:
        """stream [N + 1] -> [N]: the n-gram that ends at each symbol but the first, the start padded with the first."""
        padded = np.concatenate((np.full(self.order - 2, stream[0]), stream))
        code = np.zeros(len(stream) - 1, np.int64)
        for k in range(self.order):
            code = code * self.vocab + padded[k : k + len(code)]
        return code

    def level(self, keys: np.ndarray, counts: np.ndarray) -> Level:
        kept = counts - discounts(counts)[np.minimum(counts, 3)]
        contexts, first = np.unique(keys // self.vocab, return_index=True)
        total = np.add.reduceat(counts, first)
        return Level(keys, kept, contexts, total, 1 - np.add.reduceat(kept, first) / total)

    def losses(self, stream: np.ndarray) -> np.ndarray:
        """stream [N + 1] -> nats [N] of every symbol but the first."""
        grams = self.grams(stream)
        chance = np.full(len(grams), 1 / self.vocab)
        for n, level in enumerate(self.levels, 1):
            keys = grams % self.vocab**n
            context, seen = find(level.contexts, keys // self.vocab)
            place, known = find(level.keys, keys)
            direct = np.where(known, level.kept[place], 0) / level.total[context]
            chance = np.where(seen, direct + level.left[context] * chance, chance)
        return -np.log(chance)


def discounts(counts: np.ndarray) -> np.ndarray:
    """What to take off a count of 0, 1, 2, and 3 or more, from how many n-grams have counts of 1 to 4."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in range(1, 5))
    if not (n1 and n2 and n3 and n4):
        return np.array([0, 0.5, 0.5, 0.5])  # too few n-grams to estimate from
    y = n1 / (n1 + 2 * n2)
    estimates = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # Never nothing: every context must leave some chance for what it has not been followed by.
    return np.clip(estimates, [0, 0.1, 0.1, 0.1], [0, 1, 2, 3])


def find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> where in the sorted table each key is (anywhere if it is not there), and whether it is there."""
    place = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return place, table[place] == keys


def measure_ngrams(tokenizer: Tokenizer, seen: list[Document], documents: list[Document]) -> list[dict]:
    """Train on the text the checkpoint was trained on, score the held-out text; once in tokens, once in bytes."""

    def in_tokens(texts: list[Document]) -> np.ndarray:
        return token_stream(tokenizer, texts)

    rows = []
    kinds = [("tokens", in_tokens, tokenizer.get_vocab_size()), ("bytes", byte_stream, 257)]
    for unit, stream, vocab in tqdm(kinds, desc=f"{ORDER}-gram models", unit="model"):
        text = stream(seen)
        nats = KneserNey(text, vocab, ORDER).losses(stream(documents)).sum()
        rows.append({"unit": unit, "trained_on": len(text) - 1, "bits_per_byte": bits_per_byte(float(nats), documents)})
    return rows


def sum_prompts(tokenizer: Tokenizer, operators: int) -> tuple[list[list[int]], list[int]]:
    """-> prompts that end on an equals sign after some complete lines, and the token that should come next."""
    rng = random.Random(f"evaluate {operators}")
    prompts, answers = [], []
    for _ in range(SUMS_PER_SIZE):
        before = [sum_line(rng, rng.randint(1, LARGEST_TREE)) for _ in range(SUMS_BEFORE)]
        *prompt, answer, _ = tokenizer.encode("".join(before) + sum_line(rng, operators)).ids
        prompts.append(prompt)
        answers.append(answer)
    return prompts, answers


def measure_sums(checkpoint: Checkpoint) -> list[dict]:
    """One row a size: accuracy [R] by depth, and of always giving the answer that is right most often."""
    net, rows = checkpoint.net, []
    for operators in tqdm(range(1, LARGEST_TREE + 1), desc="arithmetic", unit="size", mininterval=5):
        prompts, answers = sum_prompts(checkpoint.tokenizer, operators)
        last = torch.tensor([len(p) - 1 for p in prompts])
        # What is padded on the right is in the future of the position that is read.
        ids = torch.tensor([p + [0] * (int(last.max()) + 1 - len(p)) for p in prompts])
        hits = [[] for _ in range(checkpoint.depth)]
        for some in torch.arange(len(ids)).split(WINDOWS_AT_ONCE * 8):
            for t, state in enumerate(net(ids[some])):
                guess = net.readout(state[torch.arange(len(some)), last[some]]).argmax(-1)
                hits[t].append(guess == torch.tensor(answers)[some])
        accuracy = [share(torch.cat(h)) for h in hits]
        gain, chance = accuracy[-1] - accuracy[0], Counter(answers).most_common(1)[0][1] / len(answers)
        rows.append({"operators": operators, "accuracy": accuracy, "gain": gain, "chance": chance})
    return rows


def greedy(net: LoopedLM, ids: Tensor, count: int) -> Tensor:
    """Prompts ids [B, T] -> the `count` most likely next tokens [B, count], one after the other at full depth."""
    length = ids.shape[1]
    for _ in range(count):
        state = net(ids)[-1][:, -1]
        ids = torch.cat((ids, net.readout(state).argmax(-1, keepdim=True)), 1)
    return ids[:, length:]


def sample_prompts(documents: list[Document]) -> list[Document]:
    """The longest documents of different modules, each from the first line that begins past its middle."""
    longest: dict[str, Document] = {}
    for document in sorted(documents, key=lambda d: len(d.text), reverse=True):
        longest.setdefault(document.source, document)
    chosen = list(longest.values())[:SAMPLES]
    return [Document(d.source, d.text[d.text.index("\n", len(d.text) // 2) + 1 :]) for d in chosen]


def measure_samples(checkpoint: Checkpoint, documents: list[Document]) -> list[dict]:
    """Continuations of held-out text, then the answer to a question about a held-out module."""
    net, tokenizer = checkpoint.net, checkpoint.tokenizer
    texts = sample_prompts(documents)
    ids = torch.tensor([tokenizer.encode(d.text).ids[:PROMPT_TOKENS] for d in texts])
    found = [
        {"title": d.source, "prompt": tokenizer.decode(prompt), "continuation": until(tokenizer, END, new)}
        for d, prompt, new in zip(texts, ids.tolist(), greedy(net, ids, NEW_TOKENS).tolist(), strict=True)
    ]
    prompt = chat(QUESTION, "").removesuffix(f"{IM_END}\n")
    new = greedy(net, torch.tensor([tokenizer.encode(prompt).ids]), NEW_TOKENS)[0].tolist()
    return [*found, {"title": "chat", "prompt": QUESTION, "continuation": until(tokenizer, IM_END, new)}]


def until(tokenizer: Tokenizer, mark: str, ids: list[int]) -> str:
    """The text of ids up to the first mark."""
    stop = tokenizer.token_to_id(mark)
    return tokenizer.decode(ids[: ids.index(stop)] if stop in ids else ids, skip_special_tokens=False)


def requirements(figures: dict, depth: int) -> list[dict]:
    """What a checkpoint must show to be worth shipping: name, what was measured, whether it is enough."""
    trained = figures["depths"][:depth]
    loss = [row["loss"] for row in trained]
    agreement = [row["agreement"] for row in trained]
    mean_depth = {row["threshold"]: row["mean_depth"] for row in figures["gate"]}
    best = max(figures["sums"], key=lambda row: row["gain"])
    (early, below), (late, above), (low, high) = EARLY_BELOW, LATE_ABOVE, FIRST_AGREEMENT
    checks = [
        ("loss falls strictly with depth", arrows(loss), all(a > b for a, b in pairwise(loss))),
        (f"agreement of depth 1 within {low} and {high}", f"{agreement[0]:.3f}", low <= agreement[0] <= high),
        ("agreement rises with depth", arrows(agreement), all(a < b for a, b in pairwise(agreement))),
        (f"mean exit depth below {below} at q = {early}", f"{mean_depth[early]:.2f}", mean_depth[early] < below),
        (f"mean exit depth above {above} at q = {late}", f"{mean_depth[late]:.2f}", mean_depth[late] > above),
    ]
    ours = trained[-1]["bits_per_byte"]
    for row in figures["ngrams"]:
        name, theirs = f"beats a {ORDER}-gram model over {row['unit']}", row["bits_per_byte"]
        checks.append((name, f"{ours:.3f} against {theirs:.3f}", ours < theirs))
    name = f"depth {depth} gains {LEAST_GAIN} over depth 1 on sums of some size"
    checks.append((name, f"{best['gain']:.2f}, operators: {best['operators']}", best["gain"] >= LEAST_GAIN))
    return [{"name": name, "measured": measured, "met": bool(met)} for name, measured, met in checks]


def arrows(values: list[float]) -> str:
    return " → ".join(f"{v:.3f}" for v in values)


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, padded so that it also reads well on a terminal."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    width = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, width, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in width) + "|", *lines[1:]])


def depth_section(rows: list[dict], depth: int) -> str:
    def line(row: dict) -> list[str]:
        name = f"{row['depth']}" if row["depth"] <= depth else f"{row['depth']} (untrained)"
        return [name, *(f"{row[key]:.4f}" for key in ("loss", "bits_per_byte", "accuracy", "agreement"))]

    head = ["depth", "loss (nats/token)", "bits per byte", "top-1 accuracy", f"agrees with depth {depth}"]
    return f"""## Depth

Held-out modules of the library, in windows of {WINDOW} tokens that overlap by half: every token is scored once, with at
least {WINDOW - STRIDE} tokens before it where the text has them. Depths beyond {depth} were not trained.

{table(head, map(line, rows))}
"""


def gate_section(rows: list[dict], depth: int) -> str:
    def line(row: dict) -> list[str]:
        shares = " / ".join(f"{100 * s:.0f}" for s in row["shares"])
        numbers = (f"{row['mean_depth']:.2f}", f"{row['loss']:.4f}", f"{row['loss_of_fixed_depths']:.4f}")
        return [f"{row['threshold']}", *numbers, shares]

    head = ["q", "mean depth", "loss", "loss of fixed depths", f"exits at 1..{depth} (%)"]
    return f"""## Exit gate

A token is read out at the first depth by which the gate's exit probabilities add up to q; the tokens before it have
run all loops. Beside its loss stands that of fixed depths: two neighbouring ones, mixed to the same mean depth without
regard to the token.

{table(head, map(line, rows))}
"""


def ngram_section(figures: dict, depth: int) -> str:
    ours, found = figures["depths"][depth - 1]["bits_per_byte"], figures["ngrams"]
    rows = [[f"{ORDER}-gram over {r['unit']}", f"{r['trained_on']:,}", f"{r['bits_per_byte']:.3f}"] for r in found]
    wins = ", ".join(f"over {r['unit']} {yes(ours < r['bits_per_byte'])}" for r in found)
    return f"""## Against {ORDER}-gram models

Interpolated modified Kneser-Ney, trained on the text that this checkpoint was trained on, scored on the same held-out
text. Does depth {depth} beat them: {wins}.

{table(["model", "symbols trained on", "bits per byte"], [*rows, [f"this one, depth {depth}", "", f"{ours:.3f}"]])}
"""


def yes(met: bool) -> str:
    return "yes" if met else "no"


def sum_section(rows: list[dict], depth: int) -> str:
    def line(row: dict) -> list[str]:
        return [f"{row['operators']}", *(f"{x:z.2f}" for x in (*row["accuracy"], row["gain"], row["chance"]))]

    example = sum_line(random.Random(0), 3).strip()
    error = 0.5 * SUMS_PER_SIZE**-0.5
    head = ["operators", *(f"depth {t + 1}" for t in range(depth)), f"depth {depth} - depth 1", "chance"]
    return f"""## Arithmetic

Expressions in prefix notation modulo {MODULUS}, such as `{example}`: the most likely token after the equals sign, on
{SUMS_PER_SIZE} fresh expressions of each size, each after {SUMS_BEFORE} complete lines. The standard error is at most
{error:.2f}. Chance is always giving the answer that is right most often.

{table(head, map(line, rows))}
"""


def sample_section(samples: list[dict]) -> str:
    def block(text: str) -> str:
        return f"````text\n{text.rstrip()}\n````\n"

    about = f"Greedy, full depth, at most {NEW_TOKENS} tokens after the mark ▶; the prompts are held-out text."
    parts = [f"## Samples\n\n{about}\n"]
    for sample in samples[:-1]:
        parts.append(f"`{sample['title']}`:\n\n" + block(f"{sample['prompt']}▶{sample['continuation']}"))
    parts.append(f"Asked “{samples[-1]['prompt']}”:\n\n" + block(samples[-1]["continuation"]))
    return "\n".join(parts)


def making_section(checkpoint: Checkpoint, figures: dict) -> str:
    recorded, shape = checkpoint.recorded, checkpoint.net.shape
    lines = [["parameters", f"{checkpoint.parameters:,}"]]
    if "tokens_per_step" in recorded:
        steps = sum(recorded[name] for name in ("steps", "settle_steps", "gate_steps"))
        seen = steps * recorded["tokens_per_step"]
        lines.append(["tokens seen", f"{seen:,}"])
    lines += [[key.replace("_", " "), f"{value}"] for key, value in recorded.items()]
    lines.append(["held-out documents", figures["held_out_documents"]])
    lines.append(["held-out tokens", f"{figures['held_out_tokens']:,}"])
    lines.append(["Python that evaluated", figures["python"]])
    missing = "" if recorded else "\nThe folder has no training.json: steps, seed and tokens seen are not recorded.\n"
    return f"""## How it was made

By `examples/tiny/train.py`, on a CPU: first the stack on the losses of all loops, then the exit gate alone.

{table(["", "value"], lines)}
{missing}
The text is the Python standard library's sources and the reference manual's topics, as they come with the interpreter
named above: {sys.copyright.splitlines()[0]} All rights reserved. PSF License Version 2. Chats are
made from its docstrings and topics, arithmetic is generated by the script. The held-out modules are in neither the text
nor the chats. The checkpoint itself is under the Apache License 2.0.

Rows in training had at most {WINDOW} tokens: longer contexts are extrapolation, although `config.json` allows
{shape.max_position_embeddings:,} positions.
"""


def requirement_section(checks: list[dict]) -> str:
    rows = [[check["name"], check["measured"], yes(check["met"])] for check in checks]
    return f"## Requirements\n\n{table(['requirement', 'measured', 'met'], rows)}\n"


def introduction(checkpoint: Checkpoint) -> str:
    shape, millions = checkpoint.net.shape, f"{checkpoint.parameters / 1e6:.1f}M"
    layers, size, loops = shape.num_hidden_layers, shape.hidden_size, shape.total_ut_steps
    return f"""---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
tags:
- ouro
- looped-transformer
- early-exit
- python
---

# Ouro, tiny

A looped language model of {millions} parameters in the layout of the published Ouro checkpoints (arXiv 2510.25741):
every token passes a stack of {layers} layers of size {size} up to {loops} times, and a gate says after each loop
whether to stop. It is for tests and demonstrations of serving with adaptive depth. It has read Python's standard
library and little sums, knows nothing else, and is not the work of the paper's authors.

`examples/tiny/evaluate.py` wrote this card and measured every figure in it.
"""


def held_out_prompts(documents: list[Document]) -> list[str]:
    """Passages that begin with a line, for benchmarks: what the checkpoint has not seen, the same on every run."""
    dice, text = random.Random(0), "".join(d.text for d in documents)
    starts = [text.index("\n", dice.randrange(len(text) - 2 * PROMPT_CHARACTERS)) + 1 for _ in range(PROMPTS)]
    return [text[start : start + PROMPT_CHARACTERS] for start in starts]


def evaluate(checkpoint: Checkpoint, say: Callable[[str], None]) -> dict:
    """Run all measurements, say each section as it is done, return the raw figures."""
    depth = checkpoint.depth
    library_documents = library()
    held = [d for d in library_documents if d.held_out]
    stream = token_stream(checkpoint.tokenizer, held)
    figures: dict = {"python": platform.python_version(), "parameters": checkpoint.parameters}
    figures["sha256"] = hashlib.sha256((checkpoint.folder / "model.safetensors").read_bytes()).hexdigest()
    figures |= {"held_out_documents": len(held), "held_out_tokens": len(stream) - 1, "training": checkpoint.recorded}
    say(introduction(checkpoint))
    scores = score(checkpoint.net, stream, depth + EXTRA_LOOPS)
    figures["depths"] = measure_depths(scores, held)
    say(depth_section(figures["depths"], depth))
    figures["gate"] = measure_gate(scores)
    say(gate_section(figures["gate"], depth))
    figures["ngrams"] = measure_ngrams(checkpoint.tokenizer, [d for d in library_documents if not d.held_out], held)
    say(ngram_section(figures, depth))
    figures["sums"] = measure_sums(checkpoint)
    say(sum_section(figures["sums"], depth))
    figures["samples"] = measure_samples(checkpoint, held)
    say(sample_section(figures["samples"]))
    say(making_section(checkpoint, figures))
    figures["requirements"] = requirements(figures, depth)
    say(requirement_section(figures["requirements"]))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent.parent / "ouro-tiny"
    parser.add_argument("checkpoint", type=Path, nargs="?", default=default, help="folder (default examples/ouro-tiny)")
    parser.add_argument("--no-card", action="store_true", help="only print, write nothing")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    args = parser.parse_args()
    if not (args.checkpoint / "config.json").exists():
        parser.error(f"no checkpoint in {args.checkpoint}; make one with python {Path(__file__).parent}/train.py")
    torch.set_num_threads(args.threads)

    began, sections = time.monotonic(), []

    def say(section: str) -> None:
        sections.append(section)
        print(f"\n{section}", flush=True)

    with torch.inference_mode():
        figures = evaluate(load(args.checkpoint), say)
    if not args.no_card:
        (args.checkpoint / "README.md").write_text("\n".join(sections), encoding="utf-8")
        write_json(args.checkpoint / "evaluation.json", figures)
        write_json(args.checkpoint / "prompts.json", held_out_prompts([d for d in library() if d.held_out]))
    done = "measured" if args.no_card else f"wrote {args.checkpoint}/README.md"
    print(f"{done} after {time.monotonic() - began:.0f} seconds")
    if missed := [check["name"] for check in figures["requirements"] if not check["met"]]:
        sys.exit(f"the checkpoint misses: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
