"""Format a comparison as one self-contained HTML page: tables, plots, and the provenance of each run."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import IO, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nestlm.report import plots
from nestlm.report.comparison import METRICS, Comparison, RunGroup
from nestlm.report.formats import caption, is_bold
from nestlm.report.runs import RunResults


def to_html(comparison: Comparison, *, title: str) -> str:
    """Return a comparison as the text of a self-contained HTML page."""
    template = Environment(
        loader=PackageLoader("nestlm.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("page.html")
    costs = dict.fromkeys(group.cost for group in comparison.groups)
    labels = [list(group.label) for group in comparison.groups]
    keys = [
        [*label, *means, len(group.seeds)]
        for label, means, group in zip(
            labels,
            comparison.means.astype(object).where(comparison.means.notna(), "").to_numpy().tolist(),
            comparison.groups,
            strict=True,
        )
    ]
    return template.render(
        title=title,
        caption=caption(comparison),
        metric=METRICS[comparison.metric].heading,
        notes=comparison.notes,
        num_keys=len(comparison.keys),
        headings=comparison.headings,
        rows=[
            list(zip(*cells, strict=True))
            for cells in zip(
                comparison.texts.to_numpy().tolist(), keys, is_bold(comparison).to_numpy().tolist(), strict=True
            )
        ],
        fronts={
            cost: data_uri(
                "svg+xml",
                lambda file, cost=cost: plots.fronts(
                    file, comparison, cost=cost, ylabel=METRICS[comparison.metric].heading
                ),
            )
            for cost in costs
        },
        routings={
            group.name: data_uri("png", lambda file, group=group: plots.routing(file, specs_of_first_seed(group)))
            for group in comparison.groups
        },
        runs=[run_row(run) for group in comparison.groups for run in group.runs],
    )


def specs_of_first_seed(group: RunGroup) -> list[dict[str, Any]]:
    """List the specs that the runs of the group's lowest seed chose, one for each budget."""
    first = min(group.seeds)
    return [spec for run in group.runs if run.seed == first for spec in run.specs]


def run_row(run: RunResults) -> dict[str, Any]:
    """Return a run's row of the page's provenance table, by the names that page.html uses."""
    known = run.provenance
    packages = ", ".join(f"{name} {version}" for name, version in known["packages"].items() if version)
    return {
        "run": str(run.folder),
        "seed": run.seed,
        "commit": str(known["commit"])[:10] + (" (dirty)" if known["dirty"] else ""),
        "text": str(known["data_fingerprint"])[:10],
        "tokenizer": str(known["tokenizer"])[:10],
        "teacher": f"{run.metrics['pretrain']['val_loss']:.4f}",
        "gap": f"{run.metrics['evaluate']['pareto_gap']:+.4f}" if run.metrics["pretrain"]["tokens"] != 0 else "",
        "machine": f"{known['device']}, {known['threads']} threads",
        "seconds": f"{known['wall_seconds']:.0f}",
        "command": " ".join(known["command"]),
        "packages": packages,
    }


def data_uri(kind: str, draw: Callable[[IO[bytes]], None]) -> str:
    """Return a picture as a data URI.

    Args:
        kind: the picture's media subtype, such as `png` or `svg+xml`.
        draw: writes the picture to a file.
    """
    file = io.BytesIO()
    draw(file)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
