"""What quality is measured on: text that was not trained on, and arithmetic of graded difficulty, as token ids."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_vllm.evaluation.data import SUMS_BEFORE, corpus
from ouro_vllm.evaluation.policies import EvalError


@dataclass(frozen=True)
class Sums:
    """Expressions of one size. operators: how many each has. prompts: token ids up to the equals sign; answers: the
    token that should come next. chance: share of the answer that is right most often."""

    operators: int
    prompts: list[list[int]]
    answers: list[int]

    @property
    def chance(self) -> float:
        return max(map(self.answers.count, self.answers)) / len(self.answers)


def held_out(tokenizer: Any, text: Path | None, most: int) -> list[int]:
    """Token ids of a text the model has not seen, at most `most`.

    tokenizer: of the package tokenizers. text: a file; None takes what the bundled checkpoint was not trained on, one
    end-of-text token before and after each document.

    Raises:
        EvalError: there is no such text, or hardly any.
    """
    if text is not None:
        try:
            ids = tokenizer.encode(text.read_text()).ids
        except (OSError, ValueError) as error:
            raise EvalError(f"{text} cannot be read as text: {error}") from None
    else:
        end = tokenizer.token_to_id(corpus().END)
        if end is None:
            raise EvalError("Only the bundled checkpoint brings its held-out text: name a file with --text.")
        ids = [end]
        for document in corpus().library():
            if document.held_out and len(ids) < most:
                ids += [*tokenizer.encode(document.text).ids, end]
    if len(ids) < 2:
        raise EvalError(f"{text} holds no text to speak of.")
    return ids[:most]


def sums(tokenizer: Any, operators: int, count: int) -> Sums:
    """Expressions in prefix notation, after the Mano task of arXiv 2510.25741, each behind some complete lines.

    The same for every caller.

    Raises:
        EvalError: this tokenizer does not give an answer a token of its own.
    """
    dice, made = random.Random(f"sums {operators}"), corpus()
    prompts, answers = [], []
    for _ in range(count):
        before = "".join(made.sum_line(dice, dice.randint(1, made.LARGEST_TREE)) for _ in range(SUMS_BEFORE))
        line = made.sum_line(dice, operators)
        asked, _, answer = line.rstrip("\n").rpartition(" ")
        prompt, whole = (tokenizer.encode(before + part).ids for part in (asked, f"{asked} {answer}"))
        if whole[:-1] != prompt:
            raise EvalError("The tokenizer splits answers or joins them with the equals sign: sums cannot be scored.")
        prompts.append(prompt)
        answers.append(whole[-1])
    return Sums(operators, prompts, answers)


def sizes() -> range:
    """Numbers of operators that sums come with."""
    return range(1, corpus().LARGEST_TREE + 1)
