"""Measure claim 9: seconds from `python train.py` to the first training step of the tiny model, with warm caches.

python benchmarks/start.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import Row, main
from shapes import Shape
from turns import Spread

TRAIN = Path(__file__).parents[1] / "train.py"
# The same command, ended at the end of its first training step.
FIRST_STEP = """
import os, runpy, sys
from nestlm.train.lightning_module import NestedLM
step = NestedLM.training_step
def first(self, batch, batch_idx):
    step(self, batch, batch_idx)
    os._exit(0)
NestedLM.training_step = first
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield the row; each start is a new process, and the text is prepared before."""
    if shape.config.hidden_size != 256:  # one model is enough: it is the demo's
        return
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_STEP, str(TRAIN), f"run_dir={folder}/run", f"cache_dir={folder}/cache"]
        seconds = []
        for number in range(1 + repeats):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if number:
                seconds.append(time.perf_counter() - started)
    yield Row("9. seconds to the first training step", "`model=tiny`", Spread.of(seconds), 8.0, "all imports included")


if __name__ == "__main__":
    main(rows)
