"""Where figures go: stdout, a JSON file, a table in a page, a plot. For the benchmarks and the evaluation."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_vllm.bench import report
from ouro_vllm.bench.children import BenchError
from ouro_vllm.evaluation.policies import EvalError
from ouro_vllm.weights import CheckpointError

Figures = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Where results go besides stdout; None leaves one out. mark: see `report.marks`."""

    json: Path | None = None
    png: Path | None = None
    readme: Path | None = None
    mark: str = "bench"


def finish(
    steps: Callable[[], Figures],
    results: Results,
    text: Callable[[Figures], str],
    table: Callable[[Figures], str],
    draw: Callable[[Figures, Path], None] | None = None,
) -> int:
    """Take figures from `steps`, print and write them. Returns the exit status: 1 after saying what is wrong.

    text, table: Markdown for the terminal and for a page. draw: writes a plot as a PNG.
    """
    try:
        check(results)
        make_folders(results)
        figures = steps()
        try:
            said = text(figures)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BenchError(f"These are not figures of this version of the command: {error!r}") from error
    except (BenchError, CheckpointError, EvalError) as error:
        print(error, file=sys.stderr)
        return 1
    print(said)
    save(figures, results.json)
    if results.readme is not None:
        report.into_readme(results.readme, results.mark, table(figures))
    if results.png is not None and draw is not None:
        draw(figures, results.png)
    return 0


def read(source: Path) -> Figures:
    """What an earlier run wrote. Raises BenchError where that cannot be read."""
    try:
        return json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{source} cannot be read as figures of an earlier run: {error}") from None


def check(results: Results) -> None:
    """Raises BenchError for what could not be written in the end, before anything is started."""
    if results.readme is not None:
        page = results.readme.read_text() if results.readme.is_file() else None
        begin, end = report.marks(results.mark)
        if page is None:
            raise BenchError(f"{results.readme} is not there: --readme names the file that takes the table.")
        if begin not in page or end not in page:
            raise BenchError(f"{results.readme} lacks `{begin}` or `{end}`: add both where the table is to stand.")
    if results.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--png needs matplotlib, the extra `bench`: pip install -e '.[bench]', or leave --png out.")


def make_folders(results: Results) -> None:
    """For the files to be written. Raises BenchError where there can be none."""
    for path in filter(None, (results.json, results.png)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"{path} cannot be written: {error}") from None
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise BenchError(f"{path} cannot be written: name a file.")


def save(figures: dict[str, Any], path: Path | None) -> None:
    """Write the figures, if there is a file for them."""
    if path is not None:
        text = json.dumps(figures, indent=1)
        # Lists of numbers on one line.
        path.write_text(re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")
