"""What is said of two runs that should be the same; the runs are written by hand."""

import csv
import json
from pathlib import Path

import pytest

from nestlm.api.reproduce import judge, missing_cores, num_threads, torch
from nestlm.report.differences import changed_cells, changed_origins
from nestlm.report.record import write_record

ROWS = [
    {"router": "uniform", "budget": "1", "val_loss": "3.5", "flops": "200"},
    {"router": "knapsack", "budget": "0.7", "val_loss": "3.25", "flops": "140"},
]
KNOWN = {
    "commit": "a" * 40, "dirty": False, "python": "3.12.1", "packages": {"torch": "2.13.0", "numpy": "2.0"},
    "device": "a CPU", "threads": 2, "data_fingerprint": "b" * 64, "tokenizer": "c" * 64, "wall_seconds": 1.0,
}  # fmt: skip


def write(folder: Path, rows=ROWS, *, width=8, ending="\n", cached=False, **provenance) -> Path:
    (folder / "specs").mkdir(parents=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator=ending)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "specs/0.7.json").write_text(json.dumps({"widths": width}))
    (folder / "timings.csv").write_text(f"what,seconds,cached\ndata,1.0,{cached}\nfind uniform 1,1.0,{cached}\n")
    (folder / "provenance.json").write_text(json.dumps(KNOWN | provenance))
    write_record(folder)
    return folder


def changed(row: int, **cells: str) -> list[dict[str, str]]:
    return [each | cells if index == row else each for index, each in enumerate(ROWS)]


# the second run, the tolerance, whether it passes, and what is said
CASES = {
    "the same": ({}, 0.0, True, ["same, bit for bit"]),
    "last bits": ({"rows": changed(1, val_loss="3.2500000000000004")}, 0.0, False,
                  ["knapsack", "0.7", "val_loss", "3.25 ", "3.2500000000000004", "+4.44e-16"]),
    "last bits on another machine": ({"rows": changed(1, val_loss="3.2500000000000004")}, 1e-9, True,
                                     ["same within 1e-09, not bit for bit"]),
    "more than the tolerance": ({"rows": changed(1, val_loss="3.5")}, 0.1, False, ["val_loss", "+0.25"]),
    "another name": ({"rows": changed(0, router="uniformer")}, 0.1, False, ["router", "uniformer"]),
    "not a number": ({"rows": changed(0, val_loss="nan")}, 0.1, False, ["val_loss", "nan"]),
    "a row less": ({"rows": ROWS[:1]}, 0.1, False, ["knapsack", "flops", "140"]),
    "line ends": ({"ending": "\r\n"}, 0.0, False, ["every number is the same, the bytes are not"]),
    "a spec": ({"width": 12}, 0.0, False, ["specs/0.7.json: differs"]),
    "a package": ({"rows": changed(0, flops="201"), "packages": {"torch": "2.12.0", "numpy": "2.0"}}, 0.0, False,
                  ["flops", "packages.torch: 2.13.0 then, 2.12.0 now"]),
    "nothing known": ({"rows": changed(0, flops="201")}, 0.0, False,
                      ["code, packages, device, threads, text and tokenizer are the same"]),
}  # fmt: skip


@pytest.mark.parametrize(("second", "tolerance", "passes", "expected"), CASES.values(), ids=CASES)
def test_what_differs_is_named(second, tolerance, passes, expected, tmp_path, capsys):
    then, now = write(tmp_path / "then"), write(tmp_path / "now", **second)
    assert judge(then, now, tolerance=tolerance) is passes
    printed = capsys.readouterr().out
    for part in expected:
        assert part in printed
    if passes:
        assert printed == f"{expected[0]}\n"


def test_stages_from_the_cache_are_a_reason(tmp_path, capsys):
    then, now = write(tmp_path / "then", cached=True), write(tmp_path / "now", changed(0, flops="1"))
    assert not judge(then, now, tolerance=0.0)
    assert "perhaps of other threads or another processor: data\n" in capsys.readouterr().out


def test_a_table_with_cells_too_many_or_too_few_is_read(tmp_path):
    then, now = write(tmp_path / "then"), write(tmp_path / "now")
    lines = (then / "results.csv").read_text().splitlines()
    (then / "results.csv").write_text("\n".join([lines[0], lines[1] + ",9", lines[2].rpartition(",")[0]]))
    assert [(cell.column, cell.then, cell.now) for cell in changed_cells(then, now)] == [
        ("None", "['9']", ""),
        ("flops", "", "140"),
    ]


def test_origins_that_only_one_run_knows_are_no_reason():
    now = {"commit": "d" * 40, "dirty": True, "threads": 2, "wall_seconds": 9.0}
    assert changed_origins(KNOWN, now) == [
        "commit: aaaaaaaaaa then, dddddddddd now",
        "code that was not committed: now",
    ]


def test_threads_are_those_of_the_run_for_a_while():
    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert missing_cores(1) == []
    assert "10000000" in missing_cores(10_000_000)[0]
