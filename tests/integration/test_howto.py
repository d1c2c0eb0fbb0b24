"""What the how-to pages say, done: the practitioner's commands, and the files of each page that adds something."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from nestlm.data.sources.stdlib import Stdlib
from nestlm.data.tokenizer import train_tokenizer
from plugins import NANO

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/howto/from-weights-to-a-latency-model.md"
ADDING = sorted((ROOT / "docs/howto").glob("add-*.md"))
NAME = re.compile(r"[\w/]+\.(?:py|yaml)")
FILE = re.compile(rf"^(`{NAME.pattern}`[^\n]*)\n\n```\w+\n(.*?)```", flags=re.DOTALL | re.MULTILINE)  # name and text
# The file to edit, the line that is there, and the one to add below it.
EDIT = re.compile(rf"`({NAME.pattern})`[^\n]*\n\n```diff\n ([^\n]+\n)\+([^\n]+\n)```")
COMMANDS = {"python train.py ": ["train.py"], "nestlm ": ["-m", "nestlm"]}


def commands(page: Path) -> list[str]:
    """Every command of a page, with its continuation lines."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block.strip() for block in blocks]


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder as the pages want it: train.py, and some files of text."""
    (tmp_path / "text").mkdir()
    for number, (_, text) in zip(range(120), Stdlib().documents(), strict=False):
        (tmp_path / f"text/{number}.txt").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


@pytest.fixture
def llama(place) -> None:
    """Weights beside them, and their tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place / "llama")
    tokenizer = train_tokenizer((path.read_text(encoding="utf-8") for path in place.glob("text/*.txt")), vocab_size=512)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place / "llama")


@pytest.mark.slow
@pytest.mark.usefixtures("llama")
@pytest.mark.timeout(600)
def test_every_command_runs_as_written_and_ends_in_a_60_percent_model(place):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(PAGE):
        done = subprocess.run(
            ["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    spec = json.loads((place / "runs/llama/specs/0.6.json").read_text())
    assert len(spec["widths"]["mlp_width"]) == 4
    header, *rows = [line.split(",") for line in (place / "runs/llama/results.csv").read_text().splitlines()]
    found = [dict(zip(header, row, strict=True)) for row in rows]
    assert {row["cost"] for row in found} == {"latency"}
    assert all(float(row["achieved"]) <= float(row["budget"]) for row in found)
    assert len([row for row in found if row["budget"] == "0.6"]) >= 2, "router and uniform"


@pytest.mark.parametrize("page", ADDING, ids=lambda page: page.stem)
def test_what_a_page_adds_runs_by_its_command(page, place):
    """In a copy of the project. A file that the project has already is the one that the page shows."""
    shutil.copytree(ROOT / "conf", place / "conf")
    shutil.copytree(ROOT / "src", place / "src", symlinks=True)  # src/nestlm/conf is a link to conf/
    files = [(NAME.findall(line)[-1], text) for line, text in FILE.findall(page.read_text(encoding="utf-8"))]
    for name, text in files:
        path = place / name
        if path.exists():
            assert path.read_text(encoding="utf-8") == text, f"{name} is another by now"
        path.write_text(text, encoding="utf-8")
    for name, before, added in EDIT.findall(page.read_text(encoding="utf-8")):
        text = (place / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} is another by now"
        (place / name).write_text(text.replace(before, before + added), encoding="utf-8")
    own = [Path(name).stem for name, _ in files]
    lines = [line.partition(" #")[0] for block in commands(page) for line in block.splitlines()]
    lines = [line for line in lines if line.startswith(tuple(COMMANDS)) and any(name in line for name in own)]
    assert lines, "a page says how to run what it adds"
    for line in lines:
        start = next(start for start in COMMANDS if line.startswith(start))
        said = line.removeprefix(start).replace("FOLDER", "text").split()
        small = [each for each in NANO if each != "data=synthetic" or "data=" not in line]
        is_short = start == "nestlm " or "dry_run=true" in said
        done = processes.run(
            [sys.executable, *COMMANDS[start], *said, *([] if is_short else small)],
            cwd=place,
            env=os.environ | {"PYTHONPATH": "src"},
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
