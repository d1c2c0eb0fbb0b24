"""The commands of the how-to for practitioners, run as they are written, on a small stand-in checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nestlm.data.source.stdlib import Stdlib
from nestlm.data.tokenizer import train

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/howto/from-weights-to-a-latency-model.md"


def commands() -> list[str]:
    """Every command of the page, with its continuation lines."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block.strip() for block in blocks]


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder as the page wants it: train.py, llama/ and text/."""
    documents = [document for document, _ in zip(Stdlib().documents(), range(120), strict=False)]
    (tmp_path / "text").mkdir()
    for number, (_, text) in enumerate(documents):
        (tmp_path / f"text/{number}.py").write_text(text, encoding="utf-8")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer = train((text for _, text in documents), vocab_size=512)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "llama")
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


@pytest.mark.timeout(600)
def test_every_command_runs_as_written_and_ends_in_a_60_percent_model(place):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands():
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
