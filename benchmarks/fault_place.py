"""Make small runs to break, and call commands of `train.py` and `nestlm` within this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TRAIN = Path(__file__).parents[1] / "train.py"
SECONDS = 180  # what takes longer hangs
LONGEST = 500  # characters of a message
STAGE = re.compile(r"-[0-9a-f]{16}(?=/|$)")  # the hash in the name of a stage's folder
SMALL = (
    "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8", "model.mlp_width=96", "model.vocab_size=288",
    "data.sequence_length=32", "data.heldout_share=0.1", "ranking.num_sequences=8", "pretrain.steps=6",
    "elastic.steps=4", "joint.steps=3", "logger=csv",
)  # fmt: skip
FEW = ("router.steps=3", "router.num_sequences=4")
RUNS = {  # what is damaged
    "static": (*SMALL, *FEW, "data=text", "data.path={texts}", "router=surrogate", "budget=[1.0,0.8]"),
    "dynamic": (
        *SMALL, *FEW, "data.path={prepared}", "router=surrogate", "router.policy=dynamic", "model.mlp_width=384",
        "budget=[1.0,0.8,0.7]",
    ),
    "shards": (*SMALL, "data.path={prepared}", "router=uniform", "budget=[1.0,0.8]"),
    "long": (
        *SMALL, "router.num_sequences=8", "data=text", "data.path={texts}", "router=surrogate", "budget=[1.0,0.8]",
        "pretrain.steps=60", "elastic.steps=30", "router.steps=20", "joint.steps=20", "checkpoint_seconds=0.02",
    ),
    "weights": (
        "model=pretrained", "model.weights={parent}", "data=text", "data.path={texts}", "router=knapsack",
        "data.sequence_length=32", "data.heldout_share=0.1", "ranking.num_sequences=8", "elastic.steps=4",
        "joint.steps=3", "budget=[1.0,[0.8,0.9params]]",
    ),
}  # fmt: skip


class Hangs(BaseException):
    """Raised when a command takes too long."""


@dataclass(frozen=True)
class Ended:
    """The exit code and output of a command.

    Attributes:
        code: its exit code; None where an exception came out of it.
        output: what it printed.
        errors: what it wrote to standard error.
        failure: the exception.
    """

    code: int | None
    output: str
    errors: str
    failure: str = ""

    @property
    def refused(self) -> bool:
        """Tell whether the command ended with exit code 2."""
        return self.code == 2

    @property
    def message(self) -> str:
        """Return the lines of the error message."""
        _, _, message = self.errors.rpartition("error: ")
        return message.strip()

    def fault(self, *, lines: int = 1, asked: str = "") -> str | None:
        """Return the fault in how the command ended; None if it worked, or was refused with a good message.

        Args:
            lines: of a refusal, at most.
            asked: what a refusal may quote.
        """
        if self.failure:
            return self.failure
        if self.code == 0:
            return None
        if not self.refused or "error: " not in self.errors:
            return f"exit code {self.code}: {self.errors[-300:]}"
        return fault_of_message(self.message, lines=lines, asked=asked)


def fault_of_message(message: str, *, lines: int, asked: str) -> str | None:
    """Return the fault in a refusal's text, or None."""
    found = message.splitlines()
    if not found or len(found) > lines:
        return f"{len(found)} lines: {message[:300]}"
    if len(message) > LONGEST:
        return f"{len(message)} characters: {message[:300]}"
    if "Traceback" in message or (numberless(message) and not numberless(asked)):
        return f"a traceback, nan or inf in: {message[:300]}"
    return None


def numberless(text: str) -> bool:
    """Tell whether a text names a number that is not one."""
    return re.search(r"(?i)\b(nan|inf|1e400)\b", text) is not None


def raise_hangs(*_: Any) -> None:
    """Raise Hangs, as the handler of SIGALRM."""
    raise Hangs


def call(main: Callable[[], None], arguments: list[str], *, seconds: int = SECONDS) -> Ended:
    """Call the entry point of a command with arguments."""
    output, errors, kept = io.StringIO(), io.StringIO(), sys.argv
    code, failure = 0, ""
    sys.argv = arguments
    before = signal.signal(signal.SIGALRM, raise_hangs)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Hangs:
        code, failure = None, f"hangs: more than {seconds} s"
    except Exception:  # noqa: BLE001 (what a user would see as a traceback)
        code, failure = None, where_raised()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = kept
    return Ended(code, output.getvalue(), errors.getvalue(), failure)


def where_raised() -> str:
    """Return the exception that is being handled, and the line of nestlm that raised it."""
    kind, error, trace = sys.exc_info()
    frames = traceback.extract_tb(trace)
    ours = [frame for frame in frames if "nestlm" in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{kind.__name__ if kind else ''} at {place}: {' '.join(str(error).split())[:200]}"


def train(*overrides: str) -> Ended:
    """Call `python train.py OVERRIDE ...`."""
    from nestlm.config import commands

    return call(commands.train, ["train.py", *overrides])


def nestlm(*arguments: object) -> Ended:
    """Call `nestlm VERB ...`."""
    from nestlm.__main__ import main

    return call(main, ["nestlm", *map(str, arguments)])


def digest(*paths: Path, root: Path) -> str:
    """Return a hash of files: of their names below a folder and of their content."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def results_of(run: Path) -> str:
    """Return a hash of what a run must reproduce: results.csv, specs and final weights."""
    kept = [run / "results.csv", *run.glob("specs/*"), *run.glob("checkpoints/joint/*.safetensors")]
    return digest(*kept, root=run)


def files_of(folder: Path) -> list[str]:
    """Return the names of all files below a folder, in an order that does not depend on hashing."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(found, key=lambda name: (STAGE.sub("", name), name))


@dataclass(frozen=True)
class Place:
    """A folder with the runs to break. The first process that asks for a run makes it."""

    root: Path

    @cached_property
    def texts(self) -> Path:
        """Make a folder of 60 text files."""
        with self.made("texts") as folder:
            if folder is not None:
                from nestlm.data.sources.synthetic import Synthetic

                for name, text in Synthetic(num_documents=60, num_words=150, seed=0).documents():
                    (folder / f"{name.replace('/', '-')}.txt").write_text(text, encoding="utf-8")
        return self.root / "texts"

    @cached_property
    def parent(self) -> Path:
        """Make a checkpoint of a model family."""
        with self.made("parent") as folder:
            if folder is not None:
                import parity

                parity.checkpoint("Llama 2", folder)
        return self.root / "parent"

    @property
    def prepared(self) -> Path:
        """Make a folder of prepared text in several shards."""
        return self.text("prepared") / "text"

    def text(self, name: str) -> Path:
        """Make a folder with prepared text in `text`; another name gives other shards."""
        with self.made(name) as folder:
            if folder is not None:
                need(self.prepare(folder / "text", share=0.1 if name == "prepared" else 0.15))
        return self.root / name

    def prepare(self, folder: Path, *, share: float = 0.1) -> Ended:
        """Prepare text in a folder, or resume preparing it."""
        sizes = ("--heldout-share", share, "--shard-tokens", 12_000)
        return nestlm("prepare", self.texts, "--tokenizer", self.parent, "--out", folder, *sizes)

    def overrides(self, name: str, place: Path, *, seed: int = 0) -> list[str]:
        """Return the command line of a run in a folder."""
        known = {
            key: getattr(self, key)
            for key in ("texts", "prepared", "parent")
            if any("{" + key + "}" in each for each in RUNS[name])
        }
        filled = [each.format(**known) if "{" in each and "{path" not in each else each for each in RUNS[name]]
        return [*filled, f"seed={seed}", f"run_dir={place / 'run'}", f"cache_dir={place / 'cache'}"]

    def run(self, name: str, *, seed: int = 0) -> Path:
        """Make a finished run; returns the folder that holds `run` and `cache`."""
        with self.made(f"{name}-{seed}") as folder:
            if folder is not None:
                need(train(*self.overrides(name, folder, seed=seed)))
        return self.root / f"{name}-{seed}"

    def killed(self, stage: str) -> Path:
        """Make a long run that is killed when a stage has two checkpoints; returns its folder."""
        with self.made(f"killed-{stage}") as folder:
            if folder is not None:
                command = [sys.executable, str(TRAIN), *self.overrides("long", folder)]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                while len(list(folder.glob(f"cache/{stage}-*/checkpoints/*.ckpt"))) < 2:
                    if process.poll() is not None:
                        raise RuntimeError(f"{stage} ended before it had two checkpoints")
                    time.sleep(0.002)
                process.kill()
                process.wait()
        return self.root / f"killed-{stage}"

    @contextmanager
    def fresh(self, folder: Path) -> Iterator[Path]:
        """Yield a copy of a folder, and remove it afterwards."""
        trials = self.root / "trials"
        trials.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=trials) as scratch:
            yield Path(shutil.copytree(folder, Path(scratch) / "place", symlinks=True))

    @contextmanager
    def made(self, name: str) -> Iterator[Path | None]:
        """Yield a folder to fill, or None where another process has filled it."""
        from filelock import FileLock

        with FileLock(self.root / f"{name}.lock"):
            folder, marker = self.root / name, self.root / f"{name}.made"
            if marker.exists():
                yield None
                return
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            yield folder
            marker.touch()


def need(ended: Ended) -> Ended:
    """Raise RuntimeError unless a command worked."""
    if ended.code != 0:
        raise RuntimeError(f"exit code {ended.code}: {ended.failure or ended.errors[-500:]}")
    return ended
