"""The numbers of a short run. A change that moves them belongs under *Numerics* in the changelog.

Write them anew with `python tests/golden/test_losses.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from plugins import NANO

STORED = Path(__file__).with_name("losses.json")
LENGTHS = ["pretrain.steps=20", "elastic.steps=10", "router.steps=20", "joint.steps=10", "budget=[1.0,0.8,0.7]"]


def losses(folder: Path) -> dict[str, float]:
    """Validation losses of all stages and budgets."""
    from nestlm.api.run_and_report import run_and_report
    from nestlm.config.compose import build, compose
    from nestlm.report.tables import read_csv

    plain = compose([*NANO, *LENGTHS, f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}"])
    run_and_report(build(plain), config=plain)
    metrics = json.loads((folder / "run/metrics.json").read_text())
    found = {
        "pretrain": metrics["pretrain"]["val_loss"],
        "rank smallest": metrics["rank"]["smallest_sliced"],
        "elastic full": metrics["elastic"]["full"],
        "elastic smallest": metrics["elastic"]["smallest"],
    }
    rows = read_csv(folder / "run/results.csv")
    return found | {f"{row['router']} {row['budget']}": row["val_loss"] for row in rows}


def test_losses_are_the_stored_ones(tmp_path):
    # Another processor sums in another order; after these few steps that stays far below what a change would do.
    assert losses(tmp_path) == pytest.approx(json.loads(STORED.read_text()), rel=2e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        STORED.write_text(json.dumps(losses(Path(scratch)), indent=2) + "\n")
