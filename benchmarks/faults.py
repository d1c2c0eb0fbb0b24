"""Try kills, damages and bad overrides: each must have no effect on results, or be refused in one line.

python benchmarks/faults.py --log docs/results/faults.csv --out docs/results/faults.md   # an hour of two cores
python benchmarks/faults.py --short                             # a minute
python benchmarks/faults.py --only "run, dynamic" --number 17   # one trial again

Right is: a killed run ends with the same bytes when its command is given again; what is damaged is refused in one line
by the verb that reads it, or done again with the same results, or not read at all; an override works, or is refused in
two lines at most. Wrong is: a traceback, another result without a word, a message without end, a command that hangs.
Exits with 1 if something was wrong. With a log, what was stopped goes on: trials that it holds and that were right are
not done again.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

KILLS, SIGNALS = "kills", 6  # of each run, at most
DAMAGES = {  # trials of the whole campaign
    "run, static": 90, "run, dynamic": 90, "run, weights": 90, "cache, static": 60, "cache, weights": 60,
    "prepared, trained on": 40, "prepared, again": 30, "checkpoints, pretrain": 16, "checkpoints, elastic": 16,
    "checkpoints, router": 16, "checkpoints, joint": 16,
}  # fmt: skip
OVERRIDES = "overrides"
FULL = {KILLS: 36, **DAMAGES, OVERRIDES: 550}
SHORT = {KILLS: 1, "run, static": 9, "cache, static": 4, "prepared, trained on": 2, OVERRIDES: 22}
HEAD = """# Kills, damages, bad overrides

{command}: on {machine}, {jobs} at a time, seed {seed}.
Commit {commits}, Python {python}, torch {torch}.

Right is: a killed run ends with the same `results.csv`, `specs/` and final weights, byte for byte, when its command is
given again; what is damaged is refused in one line by the verb that reads it, or done again with the same results, or
not read at all; an override works, or is refused in two lines at most.

"""


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: its kind, what was done, and the fault, if any. `group` and `number` repeat the trial."""

    group: str
    number: int
    kind: str
    what: str
    wrong: str
    commit: str = ""


def try_once(root: Path, group: str, number: int, seed: int, signals: int) -> list[Outcome]:
    """Do one trial, or send all signals to one run."""
    import torch

    from fault_place import Place, train

    torch.set_num_threads(1)
    place = Place(root)
    if group == KILLS:
        from fault_kills import kill

        found = kill(place, number, seed=seed, most=signals)
        return [Outcome(group, number, each.kind, each.what, each.wrong or "") for each in found]
    if group == OVERRIDES:
        from bad_overrides import bad_override, command

        kind, override = bad_override(seed, number)
        wrong = train(*command(override)).fault(lines=2, asked=override)
        return [Outcome(group, number, kind, override[:100], wrong or "")]
    from fault_damages import damage

    kind, what, wrong = damage(place, group, number, seed=seed)
    return [Outcome(group, number, kind, what, wrong or "")]


def campaign(trials: Sequence[tuple[str, int]], *, seed: int, jobs: int, signals: int) -> Iterator[Outcome]:
    """Yield outcomes of trials from several processes, each of which does one trial after the other."""
    with TemporaryDirectory(prefix="faults-") as scratch:
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        waiting = {pool.submit(try_once, Path(scratch), *each, seed, signals): each for each in trials}
        for done in as_completed(waiting):
            group, number = waiting[done]
            try:
                yield from done.result()
            except Exception as error:  # noqa: BLE001 (the campaign goes on)
                yield Outcome(group, number, "the trial itself", group, f"{type(error).__name__}: {error}"[:500])
        pool.shutdown()


def table(outcomes: Sequence[Outcome], name: Callable[[Outcome], str]) -> str:
    """Count tried, right and wrong trials by an attribute of outcomes, as a Markdown table."""
    tried, wrong = Counter(map(name, outcomes)), Counter(name(each) for each in outcomes if each.wrong)
    lines = ["| | tried | right | wrong |", "|---|---|---|---|"]
    lines += [f"| {each} | {count} | {count - wrong[each]} | {wrong[each]} |" for each, count in sorted(tried.items())]
    return "\n".join(lines) + "\n"


def tables(outcomes: Sequence[Outcome]) -> str:
    """Return tables of kills by signal, of damages by target and by kind, and of overrides by kind."""
    kills = [each for each in outcomes if each.group == KILLS]
    damages = [each for each in outcomes if each.group in DAMAGES]
    overrides = [each for each in outcomes if each.group == OVERRIDES]
    parts = [
        ("Signals, and ends of the runs that got them", kills, lambda each: each.kind),
        ("Damages", damages, lambda each: each.group),
        ("Damages, by kind", damages, lambda each: each.kind),
        ("Overrides, by kind", overrides, lambda each: each.kind),
    ]
    return "".join(f"## {title}\n\n{table(part, name)}\n" for title, part, name in parts if part)


def faults(outcomes: Sequence[Outcome], *, seed: int) -> str:
    """List the faults, and how to repeat each."""
    found = [each for each in outcomes if each.wrong]
    lines = [f"{len(found)} of {len(outcomes)} were wrong.\n"]
    for each in sorted(found, key=lambda each: (each.group, each.number)):
        again = f'python benchmarks/faults.py --seed {seed} --only "{each.group}" --number {each.number}'
        lines.append(f"- {each.kind}, {each.what}: {each.wrong}\n  `{again}`")
    return "\n".join(lines) + "\n"


class Log:
    """A CSV file to which each outcome is appended as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> list[Outcome]:
        """Read the log's outcomes without a fault, and drop the others, so that their trials are done again."""
        rows = list[Outcome]()
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [Outcome(**{**row, "number": int(row["number"])}) for row in csv.DictReader(file)]
        wrong = {(row.group, row.number) for row in rows if row.wrong}
        kept = [row for row in rows if (row.group, row.number) not in wrong]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([field.name for field in fields(Outcome)])
        for row in kept:
            self.add(row)
        return kept

    def add(self, outcome: Outcome) -> None:
        """Append an outcome."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(asdict(outcome).values())


def commit() -> str:
    """Return the commit that is tested."""
    git = shutil.which("git")
    asked = [git, "describe", "--always", "--dirty"] if git else ["false"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return said.stdout.strip() or "unknown"


def head(outcomes: Sequence[Outcome], *, jobs: int, seed: int) -> str:
    """Return the page's head: what was run, and where."""
    import torch

    from nestlm.utils.devices import cpu_name

    command = shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]])
    return HEAD.format(
        command=f"`{command}`",
        machine=f"{cpu_name()}, {os.cpu_count()} cores",
        jobs=jobs,
        commits=", ".join(dict.fromkeys(each.commit for each in outcomes)),
        python=platform.python_version(),
        torch=torch.__version__,
        seed=seed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign, or a part of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="about a minute")
    parser.add_argument("--only", choices=list(FULL), action="append", help="one kind; may be repeated")
    parser.add_argument("--number", type=int, help="one trial of that kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at a time")
    parser.add_argument("--log", type=Path, help="a CSV file that outcomes are added to, and that is gone on with")
    parser.add_argument("--out", type=Path, help="the page to write")
    asked = parser.parse_args(arguments)
    counts = SHORT if asked.short else FULL
    chosen = asked.only or list(counts)
    trials = [(group, number) for group in chosen for number in range(counts.get(group, FULL[group]))]
    if asked.number is not None:
        trials = [(group, asked.number) for group in chosen]
    os.environ["OMP_NUM_THREADS"] = "1"
    log = None if asked.log is None else Log(asked.log)
    outcomes = [] if log is None else log.take()
    known = {(each.group, each.number) for each in outcomes}
    trials = [each for each in trials if each not in known]
    started, tried = time.monotonic(), commit()
    for outcome in campaign(trials, seed=asked.seed, jobs=asked.jobs, signals=2 if asked.short else SIGNALS):
        outcome = replace(outcome, commit=tried)
        outcomes.append(outcome)
        if log is not None:
            log.add(outcome)
        if outcome.wrong:
            at = f"{outcome.group} {outcome.number}: {outcome.kind}, {outcome.what}"
            print(f"wrong: {at}: {outcome.wrong}", file=sys.stderr, flush=True)
        elif len(outcomes) % 50 == 0:
            print(f"{len(outcomes)} trials, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    page = head(outcomes, jobs=asked.jobs, seed=asked.seed)
    page += tables(outcomes) + faults(outcomes, seed=asked.seed)
    print(page)
    if asked.out is not None:
        asked.out.write_text(page, encoding="utf-8")
    return int(any(each.wrong for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
