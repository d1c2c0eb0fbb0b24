"""Commands write their own words to a terminal, and nothing of the libraries that they call."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plugins import NANO

MAIN = "from nestlm.__main__ import main; main()"
NUMBER = r"[-+\d.,e%]+"
EXPORTED = [
    r"written: .*",
    rf"largest difference of logits {NUMBER} in .*",
    rf"loss {NUMBER} on that text, {NUMBER} the whole model",
    rf"{NUMBER} parameters of {NUMBER}, {NUMBER} MB on disk",
    rf"{NUMBER} ms a forward pass in .*, {NUMBER} ms the whole model \({NUMBER}\)",
]
LLAMA = r"llama\.cpp did not run it, since llama-cpp-python is not installed; its tensors and sizes were read back"
STAGES = ("data", "pretrain", "rank", "elastic", "router", "joint", "evaluate")


def terminal_lines(place: Path, *arguments: str) -> list[str]:
    """Run `nestlm` under a pseudo-terminal of many columns, and return what stands there in the end."""
    master, slave = pty.openpty()
    around = os.environ | {"COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-c", MAIN, *arguments]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=place, env=around) as process:
        os.close(slave)
        said = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux reports the closed terminal so
                break
            if not part:
                break
            said += part
    os.close(master)
    assert process.returncode == 0, said.decode()
    lines = [line.rpartition("\r")[2] for line in said.decode().replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("kind", "options", "more"),
    [("static", (), []), ("static", ("--format", "gguf"), [LLAMA]), ("dynamic", (), [])],
    ids=["transformers", "llama.cpp", "routed"],
)
def test_an_export_says_where_it_lies_and_how_it_compares(kind, options, more, request, tmp_path):
    pytest.importorskip("transformers")
    run = request.getfixturevalue(f"{kind}_run")
    lines = terminal_lines(tmp_path, "export", str(run), "--budget", "0.8", "--out", "out", *options)
    wanted = EXPORTED + more
    assert len(lines) == len(wanted), lines
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def test_a_run_says_its_stages_and_its_results(tmp_path):
    lines = terminal_lines(tmp_path, "train", *NANO, "router.steps=3", "router.num_sequences=4", "run_dir=run")
    own = [
        rf" *({'|'.join(STAGES)}) .*",
        r"Costs as shares of the full model's flops",
        r"[┏┡└├].*",
        r"[┃│].*",
        r"loss above the teacher's, mean over budgets: .*",
        r"(teacher|full model after elastic training|smallest sub-network): .*",
        r"(tokens, and their share of the teacher's|rank correlation of) .*",
        r"run folder: run",
    ]
    strangers = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in own)]
    assert strangers == []
    assert {line.split()[0] for line in lines} >= set(STAGES)
