"""Write and print the report of a finished run: its page, plots and table of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nestlm.cost.latency.table_file import FitErrors, fit_line
from nestlm.report import plots
from nestlm.report.runs import RunResults
from nestlm.report.tables import HEADINGS, format_cells, markdown_table, read_csv, terminal_table
from nestlm.utils.console import output

PAPER_TOKEN_SHARE = 0.0763  # Flextron's elastic training, as a share of the pretraining tokens


def render(run_dir: Path) -> None:
    """Write report.md, pareto.png and routing.png into a run's folder, and print the results.

    Raises:
        DataError: the folder holds no finished run, or its files were changed.
    """
    run = RunResults.read(run_dir)
    cost = run.results[0]["cost"]
    plots.pareto(run_dir / "pareto.png", run.results, teacher_loss=run.metrics["pretrain"]["val_loss"], cost=cost)
    plots.routing(run_dir / "routing.png", run.specs)
    lines = summary_lines(run.metrics)
    write_report(run_dir, run.results, lines=lines, cost=cost)
    output.print(terminal_table(run.results, cost=cost))
    for line in lines:
        output.print(line)
    output.print(f"run folder: {run_dir}")


def summary_lines(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Summarise a run in a few lines of text.

    Args:
        metrics: content of metrics.json, by stage.
    """
    teacher, rank, elastic = (metrics[name] for name in ("pretrain", "rank", "elastic"))
    lines = [
        f"loss above the teacher's, mean over budgets: {metrics['evaluate']['pareto_gap']:+.4f}",
        f"teacher: loss {teacher['val_loss']:.4f}, {teacher['bits_per_byte']:.3f} bits per byte",
        f"full model after elastic training: {elastic['full']:.4f} ({elastic['full_over_teacher']:+.2%})",
        f"smallest sub-network: {rank['smallest_unsorted']:.4f} cut unsorted, {rank['smallest_sliced']:.4f} sorted, "
        f"{elastic['smallest']:.4f} after elastic training",
    ]
    if elastic["smallest_recovered"] is not None:
        lines[-1] += f", which recovers {elastic['smallest_recovered']:.0%}"
    if teacher["tokens"] == 0:
        lines.append("the teacher is untrained: what is held against it says nothing")
    if teacher["tokens"]:
        shares = ", ".join(
            f"{stage} {metrics[stage]['tokens']:,} ({metrics[stage]['token_share']:.2%})"
            for stage in ("elastic", "router", "joint")
        )
        lines.append(
            f"tokens, and their share of the teacher's {teacher['tokens']:,.0f}: {shares}; "
            f"elastic training in the paper: {PAPER_TOKEN_SHARE:.2%}"
        )
    if metrics["router"].get("rank_correlation") is not None:
        lines.append(
            "rank correlation of what the router's signal predicts and what is lost, on calibration text: "
            f"{metrics['router']['rank_correlation']:.3f}"
        )
    if "profile" in metrics:
        lines.append(latency_line(metrics["profile"]))
    return lines


def latency_line(profile: dict[str, Any]) -> str:
    """Describe a latency table in one line: unit, dtype, device, and how well its entries add up to measured times.

    Args:
        profile: metrics of the stage that measured the table.
    """
    check = profile["check"]
    error = "unchecked" if check is None else fit_line(FitErrors(**check))
    return f"latency: {profile['unit']}, {profile['dtype']}, measured on {profile['device']}; {error}"


def write_report(run_dir: Path, rows: list[dict[str, Any]], *, lines: list[str], cost: str) -> None:
    """Write report.md into a run's folder.

    Args:
        run_dir: the folder, which holds timings.csv.
        rows: the run's results.
        lines: the summary.
        cost: kind of cost that the budgets limit.
    """
    timings = [
        [row["what"], f"{row['seconds']:.3g}", "yes" if row["cached"] else ""]
        for row in read_csv(run_dir / "timings.csv")
    ]
    parts = [
        f"# {run_dir.name}",
        f"Achieved costs, and budgets without a unit, are shares of the full model's {cost}.",
        markdown_table(HEADINGS, [format_cells(row) for row in rows]),
        "\n".join(f"- {line}" for line in lines),
        "![Loss against cost](pareto.png)",
        "![Chosen widths](routing.png)",
        markdown_table(("what", "seconds", "from the cache"), timings),
    ]
    (run_dir / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
