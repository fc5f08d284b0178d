"""What a checkpoint is evaluated on, as token ids: text it was not trained on, and sums.

Both come from `examples/tiny/corpus.py`, which also says what the bundled checkpoint was trained on.
"""

import importlib.util
import random
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
            f"{CORPUS} is not there: install ouro-vllm from a checkout (pip install -e .), or name a text of your own "
            "with --text FILE and leave the sums out with --sums 0."
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


def held_out(tokens: Tokenizer) -> list[int]:
    """The documents the bundled checkpoint was not trained on, an end-of-text token before, between and after them."""
    end = tokens.token_to_id(corpus().END)
    if end is None:
        raise EvalError(f"The tokenizer has no {corpus().END}: name a text of your own with --text FILE.")
    documents = held_out_documents()
    return [end] + [token for text in documents for token in (*tokens.encode(text).ids, end)]


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


def sums(tokens: Tokenizer, operators: int, count: int) -> list[Sum]:
    """The model card's sums of this size (`sum_prompts` in examples/tiny/evaluate.py), the first `count` of them.

    Raises:
        EvalError: the tokenizer does not read an answer as one token.
    """
    dice, found = random.Random(f"evaluate {operators}"), []
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
