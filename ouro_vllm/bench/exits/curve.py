"""The table and the plot of what `measure` measured. Imports matplotlib when something is drawn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ouro_vllm.bench.exits.policies import FIXED, GATE, POLICIES, SURE
from ouro_vllm.bench.report import markdown

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = dict(zip(POLICIES, ("#000000", "#D55E00", "#0072B2", "#009E73"), strict=True))
MARKERS = dict(zip(POLICIES, "osD^", strict=True))


def text(figures: dict[str, Any]) -> str:
    """Everything, as Markdown for a terminal."""
    return f"\n{for_readme(figures)}\n{markdown(by_size(figures))}\n{verdict(figures)}\n"


def for_readme(figures: dict[str, Any]) -> str:
    """The table for the README, as Markdown."""
    return markdown(table(figures)) + "\n" + notes(figures)


def table(figures: dict[str, Any]) -> list[list[str]]:
    """One line per setting."""
    modes = list(next(one["speed"] for one in figures["policies"] if one["policy"] == FIXED))
    rows = [
        [
            "read after",
            "mean depth on text",
            "loss, nats/token",
            "against fixed depths at equal mean depth",
            "mean depth on sums",
            "accuracy on sums",
            "against fixed depths",
            *(f"tokens/s, {mode} (mean depth)" for mode in modes),
        ]
    ]
    for one in figures["policies"]:
        sums, speed = one["sums"], one.get("speed", {})
        rows.append(
            [
                named(one),
                f"{one['mean_depth']:.2f}",
                f"{one['loss']:.3f}",
                "" if one["policy"] == FIXED else f"{one['loss'] - one['loss_of_fixed']:+.3f}",
                f"{sums['mean_depth']:.2f}",
                f"{sums['mean_accuracy']:.3f}",
                "" if one["policy"] == FIXED else f"{sums['mean_accuracy'] - sums['mean_accuracy_of_fixed']:+.3f}",
                *(f"{speed[mode]['median']:.1f} ({speed[mode]['mean_depth']:.2f})" if speed else "" for mode in modes),
            ]
        )
    return rows


def named(one: dict[str, Any]) -> str:
    """A setting in words."""
    if one["policy"] == FIXED:
        return f"depth {one['setting']:.0f}"
    if one["policy"] == GATE:
        return f"gate, q = {one['setting']:g}"
    return f"top-1 ≥ {one['setting']:g}" if one["policy"] == SURE else f"change ≤ {one['setting']:.3f}"


def by_size(figures: dict[str, Any]) -> list[list[str]]:
    """Accuracy on sums by operators."""
    sizes = list(figures["chance"])
    rows = [["accuracy by operators", *sizes], ["chance", *(f"{figures['chance'][size]:.2f}" for size in sizes)]]
    for one in figures["policies"]:
        rows.append([named(one), *(f"{one['sums']['accuracy'][size]:.2f}" for size in sizes)])
    return rows


def gains(figures: dict[str, Any]) -> Iterator[tuple[float, float, float]]:
    """(q, loss against fixed depths at equal mean depth, accuracy against them) of the gate; below 0 and above 0 is
    better."""
    for one in figures["policies"]:
        if one["policy"] == GATE:
            sums = one["sums"]
            more = sums["mean_accuracy"] - sums["mean_accuracy_of_fixed"]
            yield one["setting"], one["loss"] - one["loss_of_fixed"], more


def verdict(figures: dict[str, Any]) -> str:
    """Whether the gate beats fixed depths."""
    found = list(gains(figures))
    better = [q for q, loss, _ in found if loss < 0]
    sums = [q for q, _, more in found if more > 0]
    return (
        f"At equal mean depth the gate's loss is below that of fixed depths at {len(better)} of {len(found)} "
        f"thresholds, its accuracy on sums above theirs at {len(sums)}."
    )


def notes(figures: dict[str, Any]) -> str:
    """How to read the table."""
    device = figures["device"].upper()
    return (
        f"{figures['model']}. Loss on {figures['text_tokens']} tokens of held-out text, accuracy on {figures['sums']} "
        f"expressions of each of {len(figures['chance'])} sizes, both in float32, all loops run. Fixed depths at equal "
        "mean depth: two neighbouring ones mixed at random. tokens/s: "
        f"{figures['dtype']}, batch {figures['batch']}, {figures['tokens']} tokens per answer on average, medians of "
        f"{figures['rounds']} rounds; the mean depth beside it is that of the answers. {device}, "
        f"{figures['threads']} threads, vLLM {figures['vllm']}. {verdict(figures)}\n"
    )


def draw(figures: dict[str, Any], path: Path) -> None:
    """Loss, accuracy and speed against mean depth, a panel each, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawing, (loss, sums, speed) = pyplot.subplots(1, 3, figsize=(15, 5))
    for policy, what in POLICIES.items():
        look: dict[str, Any] = {"color": COLOURS[policy], "marker": MARKERS[policy], "markersize": 5, "linewidth": 1.4}
        ours = sorted(
            (one for one in figures["policies"] if one["policy"] == policy), key=lambda one: one["mean_depth"]
        )
        loss.plot([one["mean_depth"] for one in ours], [one["loss"] for one in ours], label=f"{policy}: {what}", **look)
        ours.sort(key=lambda one: one["sums"]["mean_depth"])
        depths = [one["sums"]["mean_depth"] for one in ours]
        sums.plot(depths, [one["sums"]["mean_accuracy"] for one in ours], **look)
        for mode, style in zip(ours[0].get("speed", {}), ("--", "-"), strict=False):
            found = sorted((one["speed"][mode]["mean_depth"], one["speed"][mode]["median"]) for one in ours)
            speed.plot(*zip(*found, strict=True), linestyle=style, label=f"{policy}, {mode}", **look)
    for panel, name in ((loss, "loss, nats/token"), (sums, "accuracy on sums"), (speed, "tokens/s")):
        panel.set_xlabel("mean depth")
        panel.set_ylabel(name)
        panel.grid(alpha=0.25)
    speed.set_ylim(bottom=0)
    speed.legend(fontsize=8)
    where = (
        f"{figures['device'].upper()} with {figures['threads']} threads, {figures['dtype']}, batch {figures['batch']}"
    )
    drawing.suptitle(f"{figures['model']}; speed: {where}", fontsize=10)
    drawing.legend(*loss.get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8, frameon=False)
    drawing.tight_layout(rect=(0, 0.1, 1, 1))
    drawing.savefig(path, format="png", dpi=130)
    pyplot.close(drawing)
