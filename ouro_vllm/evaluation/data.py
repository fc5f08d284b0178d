"""What a checkpoint is evaluated on (here and in `bench.exits`), as token ids: text it was not trained on, and sums.

Both come from `examples/tiny/corpus.py`, which also says what the bundled checkpoint was trained on.
"""

import importlib.util
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ouro_vllm.evaluation.policies import EvalError

CORPUS = Path(__file__).parents[2] / "examples" / "tiny" / "corpus.py"
SUMS_BEFORE = 3  # complete lines before the one that is asked, as in the model card


@dataclass(frozen=True)
class Sum:
    """Tokens up to an equals sign, of which the first `prompt` are complete lines, and the token that is right next."""

    ids: list[int]
    prompt: int
    answer: int


@cache
def corpus() -> ModuleType:
    """The bundled checkpoint's corpus. Raises EvalError where the examples are not beside the package."""
    if not CORPUS.is_file():
        raise EvalError(
            f"{CORPUS} is not there: install ouro-vllm from a checkout (pip install -e .), or let `ouro-vllm eval` do "
            "without: --text FILE --sums 0."
        )
    spec = importlib.util.spec_from_file_location("ouro_tiny_corpus", CORPUS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenizer(folder: Path) -> Tokenizer:
    """Of a checkpoint's folder. Raises EvalError where it has none that can be read."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise EvalError(f"{folder} holds no tokenizer.json: name the folder of a complete checkpoint.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more particular
        raise EvalError(f"{file} cannot be read: {error}") from None


def stream(tokens: Tokenizer, file: Path | None, vocabulary: int, most: int | None = None) -> list[int]:
    """A text of a user's own or the held-out one, at most `most` tokens; vocabulary: of the model.

    Raises:
        EvalError: the file cannot be read, or the model knows fewer tokens than the tokenizer.
    """
    ids = held_out(tokens, most) if file is None else own_text(tokens, file)[:most]
    if max(ids, default=0) >= vocabulary:
        raise EvalError(f"The checkpoint's tokenizer.json has tokens beyond `vocab_size` {vocabulary}.")
    return ids


def held_out(tokens: Tokenizer, most: int | None = None) -> list[int]:
    """The documents the bundled checkpoint was not trained on, an end-of-text token before, between and after them.

    most: tokens at which to stop.
    """
    end = tokens.token_to_id(corpus().END)
    if end is None:
        raise EvalError(f"The tokenizer has no {corpus().END}: name a text of your own with --text FILE.")
    ids = [end]
    for text in held_out_documents():
        if most is not None and len(ids) >= most:
            break
        ids += [*tokens.encode(text).ids, end]
    return ids[:most]


@cache
def held_out_documents() -> list[str]:
    """Their texts. Cached: the whole library is read to find them."""
    return [document.text for document in corpus().library() if document.held_out]


def own_text(tokens: Tokenizer, file: Path) -> list[int]:
    """A user's text. Raises EvalError where it cannot be read."""
    try:
        return tokens.encode(file.read_text(encoding="utf-8")).ids
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{file} cannot be read as text: {error}") from None


def windows(stream: list[int], count: int, size: int) -> Tensor:
    """`count` pieces of `size` + 1 tokens, evenly spread; only the last token of one may be the first of another.

    Raises:
        EvalError: the stream is too short.
    """
    whole = (len(stream) - 1) // size
    if whole < count:
        raise EvalError(
            f"The text holds {whole} sequences of {size} tokens and {count} are asked for: lower --sequences or "
            "--tokens, or name a longer text."
        )
    places = [i * whole // count * size for i in range(count)]
    return torch.tensor([stream[at : at + size + 1] for at in places])


def sums(tokens: Tokenizer, operators: int, count: int, series: str = "evaluate") -> list[Sum]:
    """The first `count` sums of this size, after the Mano task of arXiv 2510.25741; the same at every call.

    series: another name, other sums; this one is the model card's (`sum_prompts` in examples/tiny/evaluate.py).

    Raises:
        EvalError: the tokenizer does not read an answer as one token.
    """
    dice, found = random.Random(f"{series} {operators}"), []
    for _ in range(count):
        sizes = (dice.randint(1, corpus().LARGEST_TREE) for _ in range(SUMS_BEFORE))
        before = "".join([corpus().sum_line(dice, size) for size in sizes])
        line = corpus().sum_line(dice, operators)
        *ids, answer, _ = tokens.encode(before + line).ids
        prompt = tokens.encode(before).ids
        if tokens.encode(before + line.rpartition(" ")[0]).ids != ids or ids[: len(prompt)] != prompt:
            raise EvalError("The tokenizer does not read a digit as one token: leave the sums out with --sums 0.")
        found.append(Sum(ids, len(prompt), answer))
    return found


def commonest(asked: list[Sum]) -> float:
    """Accuracy of always giving the answer that is right most often."""
    return Counter(one.answer for one in asked).most_common(1)[0][1] / len(asked)
