"""Damage each file of a run, of prepared text, of a cache and of checkpoints, then run the verbs that read it."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fault_place import STAGE, Ended, Place, digest, files_of, nestlm, results_of, train

PAGE = 4096
VERIFIED = 12  # one calibration in so many does the whole run again


@dataclass(frozen=True)
class Victim:
    """A file to damage.

    Attributes:
        path: the file.
        root: the folder that it belongs to.
        other: the same one of another run, where that has it.
        elsewhere: a folder that no command is told of.
        rng: what is drawn.
    """

    path: Path
    root: Path
    other: Path | None
    elsewhere: Path
    rng: random.Random

    def flip_bit(self) -> None:
        """Flip one bit at a random place of the file."""
        content = bytearray(self.path.read_bytes() or b"\0")
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        self.path.write_bytes(content)

    def zero_page(self) -> None:
        """Overwrite one page of the file, at most 4 KiB, with zeros."""
        content = self.path.read_bytes()
        start = self.rng.randrange(0, len(content) + 1, PAGE)
        self.path.write_bytes(content[:start] + bytes(len(content[start : start + PAGE])) + content[start + PAGE :])

    def truncate(self) -> None:
        """Truncate the file at a random length."""
        content = self.path.read_bytes()
        self.path.write_bytes(content[: self.rng.randrange(len(content) + 1)])

    def empty(self) -> None:
        """Truncate the file to length 0."""
        self.path.write_bytes(b"")

    def remove(self) -> None:
        """Remove a file."""
        self.path.unlink()

    def append(self) -> None:
        """Append bytes to the file."""
        with self.path.open("ab") as file:
            file.write(self.rng.randbytes(self.rng.choice((1, 40, 5000))))

    def edit(self) -> None:
        """Change a digit of a text file, or a few bytes of any other file."""
        content = self.path.read_bytes()
        digits = [at.start() for at in re.finditer(rb"[0-9]", content)]
        if digits and b"\0" not in content:
            at = self.rng.choice(digits)
            digit = self.rng.choice([each for each in b"123456789" if each != content[at]])
            self.path.write_bytes(content[:at] + bytes([digit]) + content[at + 1 :])
        else:
            at = self.rng.randrange(len(content) + 1)
            self.path.write_bytes(content[:at] + self.rng.randbytes(8) + content[at + 8 :])

    def put_others(self) -> None:
        """Replace the file by another run's file of the same name, or else by another file of its folder."""
        shutil.copyfile(self.other or sorted(self.path.parent.iterdir())[0].resolve(), self.path)

    def put_others_folder(self) -> None:
        """Replace the file's folder by another run's folder."""
        if self.other is None or self.path.parent == self.root:
            self.put_others()
        else:
            shutil.rmtree(self.path.parent)
            shutil.copytree(self.other.parent, self.path.parent)

    def link_elsewhere(self) -> None:
        """Move the file out of its folder, and leave a link to it."""
        shutil.move(self.path, self.elsewhere / self.path.name)
        self.path.symlink_to(self.elsewhere / self.path.name)

    def link_to_nowhere(self) -> None:
        """Replace the file by a link whose target does not exist."""
        self.path.unlink()
        self.path.symlink_to(self.elsewhere / "absent")

    def put_folder(self) -> None:
        """Replace the file by a folder."""
        self.path.unlink()
        self.path.mkdir()


DAMAGES: Mapping[str, Callable[[Victim], None]] = {
    "flipped bit": Victim.flip_bit,
    "zeroed page": Victim.zero_page,
    "truncated": Victim.truncate,
    "emptied": Victim.empty,
    "removed": Victim.remove,
    "another run's": Victim.put_others,
    "another run's folder": Victim.put_others_folder,
    "garbage appended": Victim.append,
    "edited": Victim.edit,
    "a link elsewhere": Victim.link_elsewhere,
    "a link to nowhere": Victim.link_to_nowhere,
    "a folder": Victim.put_folder,
}
Uses = Iterator[tuple[str, Ended, str]]  # a verb, how it ended, and what it gave


@dataclass(frozen=True)
class Target:
    """A folder to damage, and the commands that read it afterwards.

    Attributes:
        make: the folder that is copied for each calibration.
        other: one of the same form with other contents.
        part: the folder in it whose files are damaged; "." for all.
        use: commands on the copy.
        only: a part of the names of files that are damaged.
    """

    make: Callable[[Place], Path]
    other: Callable[[Place], Path]
    part: str
    use: Callable[[Place, Path, int], Uses]
    only: str = ""

    def files(self, place: Place) -> list[str]:
        """List the names of files to damage."""
        return [name for name in files_of(self.make(place) / self.part) if self.only in name]


def use_run(place: Place, folder: Path, number: int) -> Uses:
    """Open a finished run by each verb."""
    run, out = folder / "run", folder / "out"
    out.mkdir()
    ended = nestlm("generate", run, "--prompt", "def", "--budget", "0.8", "--max-tokens", 8)
    yield "generate", ended, ended.output
    ended = nestlm("evaluate", run, "--budgets", "1.0,0.8", "--out", out / "scores")
    yield "evaluate", ended, (out / "scores.csv").read_text() if ended.code == 0 else ""
    ended = nestlm("export", run, "--budget", "0.8", "--out", out / "export")
    told = {"README.md", "SHA256SUMS"}  # they tell times
    kept = [path for path in (out / "export").rglob("*") if path.is_file() and path.name not in told]
    yield "export", ended, digest(*kept, root=out)
    ended = nestlm("report", run)
    yield "report", ended, ended.output
    if number % VERIFIED == 0:
        ended = nestlm("verify", run)
        yield "verify", Ended(2, "", "error: differs") if ended.code == 1 else ended, ""


def rerun(name: str) -> Callable[[Place, Path, int], Uses]:
    """Run the same command again with the run's cache."""

    def use(place: Place, folder: Path, _: int) -> Uses:
        shutil.rmtree(folder / "run", ignore_errors=True)
        ended = train(*place.overrides(name, folder))
        yield "train", ended, results_of(folder / "run") if ended.code == 0 else ""

    return use


def train_on_prepared(place: Place, folder: Path, _: int) -> Uses:
    """Train on prepared text."""
    there = [each.replace(str(place.prepared), str(folder / "text")) for each in place.overrides("shards", folder)]
    ended = train(*there)
    yield "train", ended, results_of(folder / "run") if ended.code == 0 else ""


def prepare_again(place: Place, folder: Path, _: int) -> Uses:
    """Run `nestlm prepare` again on prepared text. It keeps finished shards; readers check them."""
    before = content(folder / "text")
    ended = place.prepare(folder / "text")
    after = content(folder / "text")
    yield "prepare", ended, content(place.prepared) if after == before else after


def content(folder: Path) -> str:
    """Return a hash of the content of prepared text."""
    names = [folder / name for name in files_of(folder) if ".lock" not in name]
    return digest(*[path for path in names if path.is_file()], root=folder)


def runs(name: str, part: str, use: Callable[[Place, Path, int], Uses]) -> Target:
    """Return a folder of the named run, and the same folder of a run with another seed."""
    return Target(lambda place: place.run(name), lambda place: place.run(name, seed=1), part, use)


def killed(stage: str) -> Target:
    """Return the checkpoints of a run that was killed in a stage."""
    return Target(
        lambda place: place.killed(stage), lambda place: place.killed(stage), "cache", rerun("long"), "checkpoints/"
    )


TARGETS: Mapping[str, Target] = {
    "run, static": runs("static", "run", use_run),
    "run, dynamic": runs("dynamic", "run", use_run),
    "run, weights": runs("weights", "run", use_run),
    "cache, static": runs("static", "cache", rerun("static")),
    "cache, weights": runs("weights", "cache", rerun("weights")),
    "prepared, trained on": Target(
        lambda place: place.text("prepared"), lambda place: place.text("other-prepared"), "text", train_on_prepared
    ),
    "prepared, again": Target(
        lambda place: place.text("prepared"), lambda place: place.text("other-prepared"), "text", prepare_again
    ),
    **{f"checkpoints, {stage}": killed(stage) for stage in ("pretrain", "elastic", "router", "joint")},
}


@cache
def draws(place: Place, name: str, seed: int) -> list[tuple[str, str]]:
    """Yield files and damages in the order of trials: in each pass every file once, with a damage new to it."""
    rng = random.Random(f"{seed}/{name}")
    each = [(file, rng.sample(list(DAMAGES), len(DAMAGES))) for file in TARGETS[name].files(place)]
    return [(file, order[turn]) for turn in range(len(DAMAGES)) for file, order in rng.sample(each, len(each))]


@cache
def expected(place: Place, name: str) -> dict[str, str]:
    """Return what the verbs return for an undamaged target."""
    target = TARGETS[name]
    with place.fresh(target.make(place)) as folder:
        found = {}
        for verb, ended, value in target.use(place, folder, 0):
            if ended.code != 0 and verb != "verify":
                raise RuntimeError(f"{name}: {verb} of what is whole: {ended.failure or ended.errors[-500:]}")
            found[verb] = value.replace(str(folder), "@")
    return found


def damage(place: Place, name: str, number: int, *, seed: int) -> tuple[str, str, str | None]:
    """Do one trial; returns how which file was damaged, and the fault in what followed, or None."""
    target, rng = TARGETS[name], random.Random(f"{seed}/{name}/{number}")
    order = draws(place, name, seed)
    file, kind = order[number % len(order)]
    wanted = expected(place, name)
    with place.fresh(target.make(place)) as folder:
        part = folder / target.part
        theirs = {STAGE.sub("", each): each for each in files_of(target.other(place) / target.part)}
        like = theirs.get(STAGE.sub("", file))
        other = None if like is None else target.other(place) / target.part / like
        (folder / "elsewhere").mkdir()
        DAMAGES[kind](Victim(part / file, part, other, folder / "elsewhere", rng))
        wrong = []
        for verb, ended, value in target.use(place, folder, number):
            fault = ended.fault()
            if fault is None and ended.code == 0 and value.replace(str(folder), "@") != wanted[verb]:
                fault = "another result, without a word"
            if fault is not None:
                wrong.append(f"{verb}: {fault.replace(str(folder), '@')}")
    return kind, STAGE.sub("", file), "; ".join(wrong) or None
