"""Tables and the plot of figures that `run` gathered. Imports matplotlib when something is drawn."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ouro_vllm.bench.modes import BASE, MODES, method, speculative

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = dict(zip(MODES, ("#000000", "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#999999", "#CC79A7"), strict=True))
MARKERS = dict(zip(MODES, "osD^Xvp", strict=True))


def text(figures: dict[str, Any]) -> str:
    """Everything, as Markdown for a terminal."""
    parts = []
    for series in figures["series"]:
        parts += [caption(figures, series), markdown(overview(figures, series)), markdown(details(figures, series))]
    return "\n" + "\n".join([*parts, notes(figures)])


def for_readme(figures: dict[str, Any]) -> str:
    """The tables for the README, as Markdown."""
    parts = [f"{caption(figures, series)}\n{markdown(overview(figures, series))}" for series in figures["series"]]
    return "\n".join([*parts, notes(figures)])


def caption(figures: dict[str, Any], series: str) -> str:
    """What a table is of."""
    return f"{figures['model']}, {figures['dtype']}, {'greedy' if series == 'greedy' else 'temperature 0.7'}:\n"


def cells(figures: dict[str, Any], series: str) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """(mode, batch size, summary), in the order of the tables."""
    for mode, sizes in figures["series"][series].items():
        for batch, cell in sizes.items():
            yield mode, batch, cell["summary"]


def overview(figures: dict[str, Any], series: str) -> list[list[str]]:
    """The table that is shown to everybody."""
    rows = [
        [
            "mode",
            "batch",
            "tokens/s, median (least to most)",
            f"ratio to {BASE} (least to most)",
            "behind the first token",
            "first token, ms",
            "passes per token",
            "rows per token",
            "ratio by R / passes per token",
            "outputs identical",
            f"*projected* ratio, flat to {figures['projection']['flat_rows']} rows",
        ]
    ]
    for mode, batch, found in cells(figures, series):
        rate, ratio, decoding = found["tokens_per_second"], found["ratio"], found["decoding_ratio"]
        rows.append(
            [
                mode,
                batch,
                f"{rate['median']:.1f} ({rate['least']:.1f} to {rate['most']:.1f})",
                f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})",
                "" if decoding is None else f"{decoding['median']:.2f}",
                f"{1000 * found['first_token_seconds']['median']:.0f}",
                f"{found['passes_per_token']:.2f}",
                f"{found['rows_per_token']:.2f}",
                f"{found['share_of_bound']:.2f}",
                f"{found['identical']:.0%}",
                f"*{found['projected_ratio']:.2f}*",
            ]
        )
    return rows


def details(figures: dict[str, Any], series: str) -> list[list[str]]:
    """What explains the overview."""
    rows = [
        [
            "mode",
            "batch",
            "rows per pass",
            "restarts per 100 tokens",
            "outside passes",
            "KV held per token of context, KiB",
            "KV read per token, each row by itself, MiB",
            "first difference at token, median (least)",
            "entry loop",
            f"agreement of depths 1 to {figures['loops'] - 1} with {figures['loops']}",
        ]
    ]
    for mode, batch, found in cells(figures, series):
        outside, differs = found["outside_passes"], found["first_difference"]
        rows.append(
            [
                mode,
                batch,
                f"{found['rows_per_pass']:.1f}",
                f"{100 * found['restarts_per_token']:.1f}",
                "" if outside is None else f"{outside:.0%}",
                f"{found['kv_bytes_held'] / 2**10:.1f}",
                f"{found['kv_bytes_read'] / 2**20:.1f}",
                "" if differs is None else f"{differs['median']:.0f} ({differs['least']:.0f})",
                found["entry"] or "",
                shares(found["agreement"][:-1]),
            ]
        )
    return rows


def shares(values: list[float | None]) -> str:
    """Numbers, and a dash where there is none."""
    return " ".join("-" if value is None else f"{value:.2f}" for value in values)


def notes(figures: dict[str, Any]) -> str:
    """How to read the tables."""
    measured = {batch for modes in figures["series"].values() for cells in modes.values() for batch in cells}
    sizes = {batch: count for batch, count in figures["requests"].items() if batch in measured}
    least, most = min(sizes, key=int), max(sizes, key=int)
    again = f" after each of {figures['starts']} starts of the engines" if figures["starts"] > 1 else ""
    answered = f"{sizes[least]} in all at batch {least}" + f" and {sizes[most]} at batch {most}" * (least != most)
    said = [
        f"Rounds: {figures['rounds']}{again}, each in about {figures['parts']} parts, the modes in turn. At batch b at "
        f"most b requests at once, a new one as soon as one is done, {answered}, of {figures['tokens']} tokens on "
        "average, from half to half as many again; until these are done others take the places that get free, and "
        "what those are given counts, too. "
        f"{figures['device'].upper()}, {figures['threads']} threads, vLLM {figures['vllm']}.",
        f"Ratios are medians over the rounds. Outputs are compared with {BASE}'s of the same round; {BASE}'s own with "
        f"those it gave at batch {least}, which shows what batching alone changes.",
        "The last column is a projection, not a measurement: for a machine whose passes cost the same up to "
        f"{figures['projection']['flat_rows']} rows, all places of the batch taken, nothing but passes costing time.",
    ]
    if "draft-verify" in figures["series"].get("sampled", {}):
        said.append(
            "At temperature 0.7 the drafts of draft-verify are judged by chance: its answers are not plain's but of "
            "the same distribution."
        )
    if (agreement := agreements(figures)) is not None:
        said.append(f"{agreement}.")
    return "\n".join(said) + "\n"


def agreements(figures: dict[str, Any]) -> str | None:
    """The agreement of the depths in words, of a mode that reads them all; None where none does."""
    for series, modes in figures["series"].items():
        for mode in sorted(modes, key=lambda mode: mode != "wavefront-full"):
            for batch, cell in modes[mode].items():
                values = cell["summary"]["agreement"][:-1]
                if values and None not in values:
                    depths = ", ".join(str(depth) for depth in range(1, figures["loops"]))
                    said = ", ".join(f"{value:.2f}" for value in values)
                    where = f"{figures['loops']} ({series}, {mode}, batch {batch})"
                    return f"Agreement of depths {depths} with {where}: {said}"
    return None


def markdown(rows: Iterable[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def marks(name: str) -> tuple[str, str]:
    """The lines between which a table stands in a page."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def into_readme(page: Path, mark: str, table: str) -> None:
    """Replace what stands between the marks of the page."""
    begin, end = marks(mark)
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    page.write_text(re.sub(pattern, lambda _: f"{begin}\n\n{table}\n{end}", page.read_text(), count=1, flags=re.DOTALL))


def draw(figures: dict[str, Any], path: Path) -> None:
    """Ratio to plain against batch size, measured and projected, one panel per series, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    count, shown = len(figures["series"]), {}
    drawing, panels = pyplot.subplots(1, count, figsize=(6.5 * count, 5.2), sharey=True, squeeze=False)
    for panel, (series, modes) in zip(panels[0], figures["series"].items(), strict=True):
        places: list[int] = []
        for mode, sizes in modes.items():
            places = [int(batch) for batch in sizes]
            found = [cell["summary"] for cell in sizes.values()]
            ratios = [one["ratio"] for one in found]
            middle = [ratio["median"] for ratio in ratios]
            look: dict[str, Any] = {"color": COLOURS[method(mode)], "marker": MARKERS[method(mode)], "markersize": 5}
            if method(mode) != mode:
                look["linestyle"] = "--"
            if mode == BASE:
                shown[mode] = panel.axhline(1.0, color=COLOURS[mode], linewidth=1)
                continue
            reach = [
                [ratio["median"] - ratio["least"] for ratio in ratios],
                [ratio["most"] - ratio["median"] for ratio in ratios],
            ]
            shown[mode] = panel.errorbar(places, middle, reach, capsize=2, linewidth=1.6, elinewidth=0.8, **look)
            if speculative(mode):
                projected = [one["projected_ratio"] for one in found]
                (line,) = panel.plot(places, projected, linewidth=1.2, mfc="white", **{**look, "linestyle": ":"})
                shown[f"{mode}, projection"] = line
        panel.set_xscale("log", base=2)
        panel.set_xticks(places, [str(place) for place in places])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("requests at once")
        panel.set_title(series if series == "greedy" else "temperature 0.7")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel(f"tokens/s, ratio to {BASE}")
    flat = figures["projection"]["flat_rows"]
    where = f"{figures['device'].upper()} with {figures['threads']} threads"
    drawing.suptitle(
        f"{figures['model']}, {figures['dtype']}, {where}. Solid: measured, least to most.\n"
        f"Dotted: a projection for a machine whose passes cost the same up to {flat} rows.",
        fontsize=9,
    )
    drawing.legend(shown.values(), shown.keys(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    drawing.tight_layout(rect=(0, 0.1, 1, 1))
    drawing.savefig(path, format="png", dpi=130)
    pyplot.close(drawing)
