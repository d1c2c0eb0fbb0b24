"""The `nestlm` command: what is done before and after a run. Training is `python train.py`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nestlm.errors import EXIT_USER_ERROR, ConfigError, NestlmError
from nestlm.utils.interrupts import exit_on_signals
from nestlm.utils.resources import check_writable, resource_error

EXIT_DIFFERENT = 1

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def nestlm() -> None:
    """Work with nested language models that `python train.py` made."""


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders with runs in them.")],
    by: Annotated[list[str] | None, typer.Option(help="A setting whose values name the rows; may be repeated.")] = None,
    metric: Annotated[str, typer.Option(help="What to compare, a column of results.csv, or time.")] = "val_loss",
    out: Annotated[Path | None, typer.Option(help="Where to write; default: report/ in the runs' folder.")] = None,
    force: Annotated[
        bool, typer.Option(help="Mark runs of different texts or uncommitted code; don't refuse.")
    ] = False,
) -> None:
    """Put runs into one table: rows by settings, columns by budget, mean and standard deviation over seeds.

    Writes it as Markdown, CSV, LaTeX and one HTML page. Of a single run's folder: prints its results, and draws its
    pictures and writes its report.md again.

    Example: nestlm report runs/ablation --by router.name --by router.policy

    Example: nestlm report runs/default/surrogate-static-seed0-1a2b3c4d
    """
    from nestlm.report.comparison import compare
    from nestlm.report.record import PROVENANCE
    from nestlm.report.render import render, render_comparison
    from nestlm.report.runs import find_runs

    if len(runs) == 1 and (runs[0] / PROVENANCE).is_file():
        check_writable(runs[0], setting="RUN")
        render(runs[0])
        return
    shared = Path(os.path.commonpath([run.absolute() for run in runs]))
    place = out or shared / "report"
    check_writable(place, setting="--out")
    comparison = compare(find_runs(runs), keys=by or (), metric=metric, force=force)
    render_comparison(comparison, folder=place, title=shared.name)


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="A folder of text files, one such file, or hf:NAME[:CONFIG][:SPLIT].", metavar="SRC")
    ],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    out: Annotated[Path, typer.Option(help="The folder to write: a new one, or one to go on with.")],
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    heldout_share: Annotated[float, typer.Option(help="Of the bytes, in each of calibration and validation.")] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="A shard is closed at this many tokens.")] = 2**26,
    begin_token: Annotated[
        str | None, typer.Option(help="Before each document; default: as the files beside the tokenizer say.")
    ] = None,
    end_token: Annotated[
        list[str] | None, typer.Option(help="Ends a text; may be repeated, the main one first; default: likewise.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Names of special tokens in texts become special tokens.")
    ] = False,
) -> None:
    """Tokenize texts into packed shards, for `data.path=FOLDER`.

    What is killed goes on after its last full shard when the same command is given again.

    Example: nestlm prepare corpus --tokenizer llama2/tokenizer.json --out prepared
    """
    from nestlm.cli.prepare import prepare_folder
    from nestlm.data.special_tokens import SpecialTokenSettings

    prepare_folder(
        source,
        out,
        tokenizer=tokenizer,
        text_key=text_key,
        heldout_share=heldout_share,
        shard_tokens=shard_tokens,
        special=SpecialTokenSettings(begin_token, end_token, special_tokens),
    )


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="As for train.py, such as model=small.")] = None,
) -> None:
    """Measure how long each choice takes on this device, for `cost=latency cost.table=FILE`.

    Example: nestlm profile model=small cost.phase=decode cost.batch_size=8 --out latency.json
    """
    from nestlm.config.compose import profile as measure

    measure(overrides or [], out=out)


@app.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder step=N.ckpt that several ranks wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
) -> None:
    """Put the shards of a training checkpoint together: model.safetensors, and router.safetensors where it trains one.

    Finished stages leave whole weights anyway.

    Example: nestlm consolidate cache/elastic-1a2b3c4d5e6f7a8b/checkpoints/step=00001000.ckpt --out weights
    """
    check_writable(out, setting="--out")
    from nestlm.distributed.sharded_checkpoint import consolidate as together

    for path in together(checkpoint, out):
        typer.echo(f"written: {path}")


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    prompt: Annotated[str, typer.Option(help="The start of a document.")],
    budget: Annotated[
        str, typer.Option(help="As in budget=: 0.6, 60%, 8GiB; limits that hold together: 0.6+8GiB.")
    ] = "1.0",
    compare: Annotated[
        str | None, typer.Option(help="Several budgets, such as 1.0,0.7,0.5: continuations side by side.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="static or dynamic; default: the run's own.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of the continuation, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Names of special tokens in the prompt are special tokens.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; default: the run's own.")] = None,
) -> None:
    """Continue a prompt at a budget, token by token; what is written where the speed is goes to standard error.

    Example: nestlm generate runs/default/surrogate-static-seed0-1a2b3c4d --budget 0.6 --prompt "def main("

    Example: nestlm generate runs/default/surrogate-static-seed0-1a2b3c4d --compare 1.0,0.7,0.5 --prompt "def main("
    """
    from nestlm.spec import Budget

    budgets = [Budget.from_str(each) for each in (compare or budget).split(",")]
    from nestlm.config.compose import load

    model = load(run, device=device)
    from nestlm.cli import output as terminal
    from nestlm.generation.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    options = {"router": router, "max_tokens": max_tokens, "sampling": sampling, "special_tokens": special_tokens}
    if compare is not None:
        terminal.compare(model, prompt, budgets=budgets, **options)
    else:
        terminal.write(model, prompt, budget=budgets[0], **options)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the data group, as for train.py: data=text data.path=FOLDER.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Such as 1.0,0.6,0.5; default: the run's own.")] = None,
    tasks: Annotated[str, typer.Option(help="Of the EleutherAI harness, such as arc_easy,hellaswag.")] = "",
    task_files: Annotated[
        Path | None, typer.Option(help="A folder with tasks in YAML files: the only ones known.")
    ] = None,
    shots: Annotated[str, typer.Option(help="Examples before a question, such as piqa=5; default: the paper's.")] = "",
    limit: Annotated[int | None, typer.Option(help="Of the questions of each task, the first ones only.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of the tasks; default: data.eval_batch_size.")] = None,
    router: Annotated[str | None, typer.Option(help="static or dynamic; default: the run's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Writes OUT.csv and OUT.md; default: RUN/evaluation.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; default: the run's own.")] = None,
) -> None:
    """Score budgets on held-out text, the run's or another, and on tasks: a row a budget, on one set of weights.

    Example: nestlm evaluate runs/default/surrogate-static-seed0-1a2b3c4d --budgets 1.0,0.6,0.5

    Example: nestlm evaluate runs/default/surrogate-static-seed0-1a2b3c4d --tasks arc_easy,hellaswag,mmlu

    Example: nestlm evaluate runs/default/surrogate-static-seed0-1a2b3c4d data=text data.path=FOLDER
    """
    from nestlm.spec import Budget

    asked = None if budgets is None else [Budget.from_str(each) for each in budgets.split(",")]
    numbers = shots_of(shots)
    place = out or run / "evaluation"
    check_writable(place.parent, setting="--out")
    from nestlm.config.compose import data_settings, load, plain_errors

    with plain_errors():
        model = load(run, device=device)
        data = data_settings(overrides, run=run) if overrides else None
        rows = model.evaluate(
            asked,
            router=router,
            data=data,
            tasks=[name for name in tasks.split(",") if name],
            task_files=task_files,
            shots=numbers,
            limit=limit,
            batch_size=batch_size,
        )
    from nestlm.cli.output import print_scores

    text = "the run's own" if overrides is None else " ".join(overrides)
    print_scores(rows, out=place, title=f"{run.name}: held-out text of {text}")


def shots_of(text: str) -> dict[str, int]:
    """Numbers by task from `piqa=5,mmlu=0`. Raises ConfigError for anything else."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if not number.isdigit():
            raise ConfigError(f"--shots: got {part!r}, wanted TASK=NUMBER, such as piqa=5")
        found[name] = int(number)
    return found


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Where text and weights are now: data.path=FOLDER model.weights=FOLDER.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the second run works and stays; default: a temporary folder.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="By how much numbers may differ, such as on another machine.")
    ] = 0.0,
) -> None:
    """Do a run again, with its own config, latency table and number of threads, and compare the results.

    Nothing comes from the cache. Exits with 0 if results.csv and specs/ are the same bytes, with 1 if they are not,
    and with 2 if the run cannot be done again.

    Example: nestlm verify runs/default/surrogate-static-seed0-1a2b3c4d

    Example: nestlm verify runs/default/surrogate-static-seed0-1a2b3c4d data.path=/data/moved
    """
    from nestlm.config.compose import verify as is_same

    if not is_same(run, out=out, tolerance=tolerance, overrides=overrides or ()):
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    budget: Annotated[str, typer.Option(help="As in budget=: 0.6, 60%, 8GiB; several limits as 0.6+8GiB.")],
    out: Annotated[Path, typer.Option(help="The folder to write, a new one.")],
    form: Annotated[str, typer.Option("--format", help="hf for transformers, gguf for llama.cpp.")] = "hf",
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The best sub-network of equal widths in all layers.")
    ] = False,
    router: Annotated[
        str | None, typer.Option(help="static: one sub-network; dynamic: tokens decide; default: as the run.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="f32, f16, bf16, or q8_0 of gguf; default: the parent's, else f32.")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="OWNER/NAME, a private repository.")] = None,
) -> None:
    """Write a stand-alone model for a budget, and check that it computes what the nested one does.

    Example: nestlm export runs/default/surrogate-static-seed0-1a2b3c4d --budget 0.6 --out small
    """
    from nestlm.spec import Budget

    asked = Budget.from_str(budget)
    check_writable(out.parent, setting="--out")
    from nestlm.config.compose import load
    from nestlm.utils.console import output

    check = load(run, device="cpu").export(
        out,
        budget=asked,
        form=form,
        uniform=uniform,
        router=router,
        precision=dtype,
        push_to=push_to_hub,
    )
    for line in [f"written: {out}", *check.lines()]:
        output.print(line, markup=False, highlight=False)


def main() -> None:
    """Entry point: errors that a user can cure are one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of a terminal that cannot show every character
            stream.reconfigure(errors="backslashreplace")
    exit_on_signals()
    try:
        app()
    except Exception as error:
        known = error if isinstance(error, NestlmError) else resource_error(error)
        if known is None:
            raise
        typer.echo(f"error: {known}", err=True)
        raise SystemExit(EXIT_USER_ERROR) from None
