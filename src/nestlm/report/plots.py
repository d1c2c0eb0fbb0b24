"""Draw the plots of a run, and of a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from nestlm.report.comparison import Comparison

Row = Mapping[str, Any]
MARKERS = "osD^vP"
MOST_NUMBERS = 400  # a heat map of more cells shows colours only


def fronts(file: IO[bytes], comparison: Comparison, *, cost: str, ylabel: str) -> None:
    """Plot the means of a comparison against achieved cost, as SVG: a line for each row of its table.

    A band around each line is one standard deviation over seeds.

    Args:
        file: the file to write to.
        comparison: the comparison.
        cost: kind of cost; rows with budgets of other kinds are left out.
        ylabel: label of the metric's axis.
    """
    groups = [(row, group) for row, group in enumerate(comparison.groups) if group.cost == cost]
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    palette = colormaps["tab20" if len(groups) > 10 else "tab10"]
    for number, (marker, (row, group)) in enumerate(zip(cycle(MARKERS), groups, strict=False)):
        color = palette(number % palette.N)
        points = comparison.cells.loc[row].fillna({"std": 0.0}).sort_values(["achieved", "mean"])
        cost_N, mean_N, deviation_N = points[["achieved", "mean", "std"]].to_numpy(dtype=float).T
        axes.plot(cost_N, mean_N, marker=marker, color=color, markersize=4, label=group.name)
        axes.fill_between(cost_N, mean_N - deviation_N, mean_N + deviation_N, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(f"{cost}, share of the full model")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, format="svg")


def pareto(path: Path, rows: Sequence[Row], *, teacher_loss: float, cost: str) -> None:
    """Plot a run's losses against achieved cost: one line for each router, the full model and the teacher marked.

    Args:
        path: the PNG file to write.
        rows: rows of the run's results.csv.
        teacher_loss: validation loss of the teacher, nats per token.
        cost: kind of cost that the budgets limit.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for marker, router in zip(cycle(MARKERS), dict.fromkeys(row["router"] for row in rows), strict=False):
        points = sorted((row["achieved"], row["val_loss"]) for row in rows if row["router"] == router)
        axes.plot(*zip(*points, strict=True), marker=marker, label=router)
    for row in rows:
        if row["achieved"] == 1.0:
            axes.plot(row["achieved"], row["val_loss"], "*", markersize=16, color="black", zorder=3, label="full model")
            break
    axes.axhline(teacher_loss, color="grey", linestyle="--", linewidth=1, label="teacher")
    axes.set_xlabel(f"{cost}, share of the full model")
    axes.set_ylabel("validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def routing(path: Path | IO[bytes], specs: Sequence[Row]) -> None:
    """Plot the widths that a router chose as a heat map: layers by budgets, the cheapest first, a panel for each axis.

    Args:
        path: the PNG file to write.
        specs: contents of the files in the run's specs folder.
    """
    chosen = sorted(specs, key=lambda spec: (spec["achieved"], spec["budget"]))
    full_widths = chosen[0]["full_widths"]
    figure = Figure(figsize=(0.9 * len(chosen) * len(full_widths) + 2.4, 3.6), layout="constrained")
    panels = list(figure.subplots(1, len(full_widths), squeeze=False)[0])
    for panel, (name, full) in zip(panels, full_widths.items(), strict=True):
        widths = np.array([spec["widths"][name] for spec in chosen]).T  # layers by budgets
        layers = chosen[0].get("layers", {}).get(name, range(len(full)))  # older runs have choices in all of them
        shares = widths / np.array(full)[:, None]
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        if widths.size <= MOST_NUMBERS:
            for (layer, column), width in np.ndenumerate(widths):
                color = "black" if shares[layer, column] > 0.6 else "white"
                panel.text(column, layer, f"{width:.0f}", ha="center", va="center", fontsize=8, color=color)
        panel.set_title(name)
        panel.set_xticks(range(len(chosen)), [spec["budget"] for spec in chosen])
        ticks = range(0, len(widths), max(1, len(widths) // 8))
        panel.set_yticks(ticks, [str(layers[tick]) for tick in ticks])
        panel.set_xlabel("budget")
        if panel is panels[-1]:
            figure.colorbar(image, ax=panels, label="share of the full width")
    panels[0].set_ylabel("layer")
    figure.suptitle(chosen[0]["router"])
    figure.savefig(path, dpi=130)
