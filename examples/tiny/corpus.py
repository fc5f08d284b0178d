"""What the bundled checkpoint reads: Python's standard library, chats about it, and arithmetic that needs depth.

Everything comes with the interpreter that runs this file, so a fresh machine can rebuild it. The library's sources and
documentation are under the Python Software Foundation License 2.
"""

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Special tokens stand where the published tokenizer has them: 0, 1, 2, and the thinking marks after them.
SPECIAL = (END, IM_START, IM_END, "<think>", "</think>")
MODULUS = 5
LARGEST_TREE = 8
# Tables of code points, tests and vendored packages: bulk that teaches nothing.
SKIP = {"__pycache__", "encodings", "ensurepip", "idle_test", "lib2to3", "site-packages", "test", "tests", "turtledemo"}


@dataclass(frozen=True)
class Document:
    """One text. `source` is its top-level module, by which the held-out split is made."""

    source: str
    text: str

    @property
    def held_out(self) -> bool:
        """About 5% of modules. A hash of the name, so that no Python version trains on what another one tests."""
        return hashlib.sha256(self.source.encode()).digest()[0] < 13


def library() -> list[Document]:
    """Every module of the running interpreter's standard library, then the reference manual's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIP.intersection(parts) or parts[0] == "pydoc_data":
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        documents.append(Document(parts[0].removesuffix(".py"), text))
    return documents + [Document(f"topic {name}", text) for name, text in topics().items()]


def topics() -> dict[str, str]:
    from pydoc_data.topics import topics as manual

    return {name: str(text) for name, text in manual.items()}


def chat(question: str, answer: str) -> str:
    """One exchange, laid out as the chat template lays it out."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"


def chats(documents: list[Document]) -> list[Document]:
    """Questions that the documentation answers: what a function does, what a topic says."""
    found = []
    for document in documents:
        if document.source.startswith("topic "):
            subject, text = document.source.removeprefix("topic ").lower(), document.text
            found.append(Document(document.source, chat(f"Explain {subject} in Python.", paragraph(text))))
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for name, text in docstrings(tree, document.source):
            found.append(Document(document.source, chat(f"What does {name} do?", paragraph(text))))
    return found


def docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}"
            if text := ast.get_docstring(child):
                yield name, text
            yield from docstrings(child, name)


def paragraph(text: str) -> str:
    """The first paragraph that is prose, on one line: headings and their rules are passed over."""
    for part in text.strip().split("\n\n"):
        line = " ".join(part.split())
        if line and not set(line.split()[-1]) <= set("*=-~^"):
            return line
    return " ".join(text.split())


def expression(rng: random.Random, operators: int) -> tuple[str, int]:
    """A random tree in prefix notation, tokens apart, with its value modulo MODULUS (after the paper's Mano task)."""
    if operators == 0:
        value = rng.randrange(MODULUS)
        return str(value), value
    left = rng.randrange(operators)
    a, x = expression(rng, left)
    b, y = expression(rng, operators - 1 - left)
    sign = rng.choice("+-*")
    value = {"+": x + y, "-": x - y, "*": x * y}[sign] % MODULUS
    return f"{sign} {a} {b}", value


def sum_line(rng: random.Random, operators: int) -> str:
    """`+ * 3 4 2 = 4` and a line end: what the model is asked to complete after the equals sign."""
    text, value = expression(rng, operators)
    return f"{text} = {value}\n"


def sum_chat(rng: random.Random, operators: int) -> str:
    text, value = expression(rng, operators)
    return chat(f"Evaluate modulo {MODULUS}: {text}", str(value))


def train_tokenizer(documents: list[Document], vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE; digits stand alone so that arithmetic reads one operand a token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\d| ?[\p{L}_]+| ?[^\s\p{L}\d_]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    sums = [sum_line(rng, rng.randint(1, LARGEST_TREE)) for _ in range(4000)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([d.text for d in documents] + sums, trainer)
    return tokenizer
