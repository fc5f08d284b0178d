"""Tables of figures that `measure` measured, beside the paper's."""

from typing import Any

from ouro_vllm.bench.report import markdown
from ouro_vllm.evaluation.policies import BASE, CONTROL, POLICIES
from ouro_vllm.sharing import AVERAGE, LAST

# arXiv 2510.25741, Table 14: accuracy in percent of the 1.4B model, KV reused in decoding only.
PAPER = {
    "GSM8K": {BASE: 78.92, LAST: 78.85, AVERAGE: 78.73, CONTROL: 18.73},
    "MATH-500": {BASE: 82.40, LAST: 80.40, AVERAGE: 78.52, CONTROL: 8.43},
}


def text(figures: dict[str, Any]) -> str:
    """Everything, as Markdown, for a terminal and for a page."""
    return "\n".join([f"{figures['model']}, float32:\n", markdown(ours(figures)), notes(figures), *paper()])


def ours(figures: dict[str, Any]) -> list[list[str]]:
    """The table of what was measured, its head first."""
    sizes = [row["operators"] for row in figures["settings"][0]["sums"]]
    head = ["policy", "window", "loss, nats/token", f"above `{BASE}`", f"top-1 agreement with `{BASE}`"]
    rows = [[*head, *(f"sums, {size} operator{'s' * (size > 1)}" for size in sizes)]]
    for one in figures["settings"]:
        base = one["policy"] == BASE
        rows.append(
            [
                one["policy"] + (" (control)" if one["policy"] == CONTROL else ""),
                "" if base else f"{one['window']}",
                f"{one['loss']['mean']:.4f}",
                "" if base else with_error(one["cost"], 4, "+"),
                "" if base else with_error(one["agreement"], 3),
                *(
                    f"{row['accuracy']['mean']:.2f}" + ("" if base else f" ({with_error(row['difference'], 2, '+')})")
                    for row in one["sums"]
                ),
            ]
        )
    return rows


def with_error(value: dict[str, float | None], digits: int, sign: str = "") -> str:
    """`0.95 ± 0.01`, or the value alone where its error is not known."""
    shown = f"{value['mean']:{sign}z.{digits}f}"
    return shown if value["error"] is None else f"{shown} ± {value['error']:.{digits}f}"


def notes(figures: dict[str, Any]) -> str:
    """How to read the table, and what the control says of it."""
    generated = figures["tokens"] - figures["prompt"]
    source = figures["text"] or f"text the bundled checkpoint has not seen (the library of Python {figures['python']})"
    said = [
        f"Text: {figures['sequences']} sequences of {figures['tokens']} tokens of {source}; the first "
        f"{figures['prompt']} are the prompt, what the other {generated} say about their next token is scored. ± is "
        f"one standard error over sequences, of differences to `{BASE}` sequence by sequence.",
    ]
    if figures["sums"]:
        chance = ", ".join(f"{value:.2f}" for value in figures["chance"])
        said.append(
            f"Sums: {figures['sums']} of each size. The lines before one are the prompt, its own tokens count as "
            "generated: an answer right behind a prompt would not read shared KV at all. In brackets the difference to "
            f"`{BASE}`, sum by sum. Always giving the commonest answer: {chance}."
        )
    if figures["block"] > 1:
        said.append(f"The window's start is rounded down to a multiple of {figures['block']} tokens.")
    if (control := judged(figures)) is not None:
        said.append(control)
    return "\n".join(said) + "\n"


def judged(figures: dict[str, Any]) -> str | None:
    """The control against the other policies at the smallest window; None where either was not measured."""
    shared = [one for one in figures["settings"] if one["policy"] != BASE]
    window = min((one["window"] for one in shared), default=None)
    costs = {one["policy"]: one["cost"]["mean"] for one in shared if one["window"] == window}
    control = costs.pop(CONTROL, None)
    if control is None or not costs:
        return None
    worst = max(costs, key=costs.get)
    verdict = (
        "costs most, as it must" if control > costs[worst] else "does NOT cost most: do not trust this measurement"
    )
    found = f"{control:+.3f} nats/token at window {window}, `{worst}` {costs[worst]:+.3f}"
    return f"The control `{CONTROL}` {verdict}: {found}."


def paper() -> list[str]:
    """The paper's table, and what both say."""
    tests = list(PAPER)
    rows = [["policy", *(f"{test}, %" for test in tests)]]
    rows += [[policy, *(f"{PAPER[test][policy]:.2f}" for test in tests)] for policy in POLICIES]
    return [
        "The paper's figures for Ouro-1.4B (arXiv 2510.25741, Table 14; reuse in decoding only, no window):\n",
        markdown(rows),
        f"Sharing is not lossless: `{BASE}` is the model as trained, every other policy is an approximation.\n",
    ]
