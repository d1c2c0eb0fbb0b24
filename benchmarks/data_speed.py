"""Measure tokens per second of `nestlm prepare`, of its tokenizer alone, and of the loader with 0, 1 and 2 workers.

OMP_WAIT_POLICY=PASSIVE python benchmarks/data_speed.py > docs/results/data.md
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from nestlm.data import tokenizer as tokenizers
from nestlm.data.preparation import batch_documents, prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import Portion
from nestlm.data.sources.stdlib import Stdlib
from nestlm.data.sources.text import TextFolder
from nestlm.data.step_loader import StepLoader
from nestlm.utils.devices import cpu_name

REPEATS = 7
LENGTH, BATCH, STEPS = 2048, 8, 200
VOCAB = 8192
MB = 10**6


def write_corpus(folder: Path, *, megabytes: float) -> None:
    """Write the standard library's source several times; each copy uses identifiers of its own."""
    folder.mkdir()
    documents = list(Stdlib().documents())
    written = 0
    for number, (_, text) in enumerate(cycle(documents)):
        copy = number // len(documents)
        changed = text.replace("self", f"self{copy}") if copy else text
        path = folder / f"{number:06d}.py"
        path.write_text(changed, encoding="utf-8")
        written += path.stat().st_size
        if written >= megabytes * MB:
            return


def tokenizer_alone(source: TextFolder, file: Path) -> dict[str, float]:
    """Return tokens per second of the tokenizer's threads, with batches as large as prepare's."""
    tokenizer = tokenizers.make_text_encoder(tokenizers.load_tokenizer(file))
    batches = [[text for _, text in batch] for batch in batch_documents(source.documents(), skip=0)]
    started, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for texts in batches:
        tokens += sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return {
        "the tokenizer alone (`encode_batch_fast`, texts in memory)": tokens / (time.perf_counter() - started),
        "the tokenizer alone, a CPU second": tokens / (time.process_time() - cpu),
    }


def prepare_all(source: TextFolder, file: Path) -> dict[str, float]:
    """Return tokens per second of prepare, from text files to token files."""
    with TemporaryDirectory() as out:
        timings: dict[str, float] = {}
        started, cpu = time.perf_counter(), time.process_time()
        manifest = prepare_source(
            source, Path(out), vocab_size=None, tokenizer_file=file, heldout_share=0.02, timings=timings
        )
        return {
            "`nestlm prepare`, after the first pass over the files": manifest.num_tokens / timings["seconds"],
            "`nestlm prepare`, all of it": manifest.num_tokens / (time.perf_counter() - started),
            "`nestlm prepare`, all of it, a CPU second": manifest.num_tokens / (time.process_time() - cpu),
        }


def load(prepared: PreparedData, num_workers: int) -> dict[str, float]:
    """Return tokens per second of the loader, from its first batch to its last."""
    loader = StepLoader(
        prepared.rows("train", sequence_length=LENGTH),
        num_steps=STEPS,
        batch_size=BATCH,
        seed=0,
        stream="speed",
        separator=prepared.special_tokens.begin,
        num_workers=num_workers,
    )
    batches = iter(loader)
    next(batches)  # workers have started
    started = time.perf_counter()
    steps = sum(1 for _ in batches)
    return {f"{num_workers} workers": steps * BATCH * LENGTH / (time.perf_counter() - started)}


def measure(runs: list[Callable[[], dict[str, float]]], *, repeats: int) -> dict[str, list[float]]:
    """Return speeds by name. Repetitions of the different measurements alternate."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for run in islice(cycle(runs), repeats * len(runs)):
        for name, speed in run().items():
            speeds[name].append(speed)
    return speeds


def table(speeds: dict[str, list[float]]) -> None:
    """Return a Markdown table of medians and quartiles."""
    print("| | tokens/s: median | quartiles |\n|---|---|---|")
    for name, values in speeds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"| {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} |")


def main() -> None:
    """Measure, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=12, help="of text")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with TemporaryDirectory() as root:
        corpus, data, trained = Path(root) / "corpus", Path(root) / "data", Path(root) / "tokenizer.json"
        write_corpus(corpus, megabytes=arguments.megabytes)
        source = TextFolder(str(corpus))
        texts = (text for _, text in islice(Stdlib().documents(), 300))
        tokenizers.train_tokenizer(texts, vocab_size=VOCAB).save(str(trained))
        busy = os.getloadavg()[0]
        speeds = measure(
            [lambda: tokenizer_alone(source, trained), lambda: prepare_all(source, trained)],
            repeats=arguments.repeats,
        )
        data.mkdir()
        manifest = prepare_source(source, data, vocab_size=None, tokenizer_file=trained, heldout_share=0.02)
        print("# How fast data is prepared and loaded\n")
        documents = sum(split.documents for split in manifest.splits.values())
        print(
            f"{cpu_name()}, {cores} cores (load {busy:.1f} before it began), Python {platform.python_version()}. "
            f"{arguments.megabytes:g} MB of Python source in {documents:,} files, a byte-level BPE of {VOCAB:,} "
            f"tokens, {manifest.num_tokens:,} tokens. {arguments.repeats} repeats, interleaved. Generated by "
            f"`OMP_WAIT_POLICY=PASSIVE python benchmarks/data_speed.py --megabytes {arguments.megabytes:g}`.\n"
        )
        table(speeds)
        prepared = PreparedData.open([Portion(data, 1.0)])
        print(f"\nThe loader: rows of {LENGTH:,} tokens, {BATCH} a batch, every row's blocks checked.\n")
        loaders = [partial(load, prepared, number) for number in range(3)]
        table(measure(loaders, repeats=arguments.repeats))


if __name__ == "__main__":
    main()
