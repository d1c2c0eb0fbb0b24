"""A comparison as one HTML file that needs nothing else: tables, pictures, and where each number comes from."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import IO, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nestlm.report import plots
from nestlm.report.comparison import METRICS, Comparison, Line
from nestlm.report.formats import caption
from nestlm.report.runs import RunResults


def to_html(comparison: Comparison, *, title: str) -> str:
    """The page."""
    template = Environment(
        loader=PackageLoader("nestlm.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("page.html")
    costs = dict.fromkeys(line.cost for line in comparison.lines)
    return template.render(
        title=title,
        caption=caption(comparison),
        metric=METRICS[comparison.metric].heading,
        notes=comparison.notes,
        num_keys=len(comparison.keys),
        headings=comparison.headings(),
        rows=[comparison.shown(line) for line in comparison.lines],
        fronts={
            cost: data_uri("svg+xml", lambda file, cost=cost: plots.fronts(file, comparison, cost=cost))
            for cost in costs
        },
        routings={
            line.name: data_uri("png", lambda file, line=line: plots.routing(file, routed_specs(line)))
            for line in comparison.lines
        },
        runs=[run_row(run) for line in comparison.lines for run in line.runs],
    )


def routed_specs(line: Line) -> list[dict[str, Any]]:
    """What the first seed's runs chose, budget by budget."""
    first = min(line.seeds)
    return [spec for run in line.runs if run.seed == first for spec in run.specs]


def run_row(run: RunResults) -> dict[str, Any]:
    """Where a run's numbers come from."""
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
    """A picture as an address that holds it."""
    file = io.BytesIO()
    draw(file)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
