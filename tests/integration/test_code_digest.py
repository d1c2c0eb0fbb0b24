"""Which edits of the package make cached stages stale: those of code that determines results, and no others."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import processes
from nestlm.pipeline.code_digest import PACKAGE, closure, pipeline_modules
from plugins import NANO

ROOT = Path(__file__).parents[2]
DIGESTS = """
import json, sys
from nestlm.config.compose import build, compose
from nestlm.pipeline.code_digest import code_digest
from nestlm.pipeline.order import STAGES
settings = build(compose(sys.argv[1:]))
print(json.dumps({kind.name: code_digest(kind.of(settings)) for kind in STAGES}))
"""
# Files whose edit leaves every stage cached, and files with the stages that their edit makes stale by itself.
HARMLESS = (
    "estimate/memory.py", "estimate/fake_step.py", "report/run_folder.py", "cli/app.py", "api/run_and_report.py",
    "config/compose.py", "export/hf_folder.py", "generation/generate.py", "elastic/sampler/sandwich.py",
)  # fmt: skip
EVERY = {"profile", "data", "pretrain", "rank", "elastic", "router", "joint", "evaluate"}
STALE = {
    "nn/attention.py": EVERY,
    "pipeline/stages/elastic.py": EVERY,
    "elastic/sampler/within_batch.py": {"elastic"},  # later keys cover the key of elastic
    "train/signal/surrogate_static.py": {"router", "joint", "evaluate"},
}


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the project."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copytree(ROOT / "src", tmp_path / "src", symlinks=True)  # src/nestlm/conf is a link to conf/
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "digests.py").write_text(DIGESTS, encoding="utf-8")
    return tmp_path


def edit(copy: Path, name: str) -> None:
    """Add a comment to a file of the package."""
    path = copy / "src/nestlm" / name
    path.write_text(path.read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8")


def python(copy: Path, *arguments: str) -> str:
    """Run Python in the copy; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    done = processes.run([sys.executable, *arguments], cwd=copy, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_edit_makes_the_stages_stale_whose_code_it_is(copy):
    def digests() -> dict[str, str]:
        return json.loads(python(copy, "digests.py", *NANO))

    known = digests()
    assert set(known) == EVERY
    for name in HARMLESS:
        edit(copy, name)
    assert digests() == known
    for name, stages in STALE.items():
        edit(copy, name)
        found = digests()
        assert {stage for stage in known if found[stage] != known[stage]} == stages, name
        known = found


def test_a_run_after_edits_of_reports_and_estimates_comes_from_the_cache(copy):
    def cached(name: str) -> dict[str, str]:
        python(copy, "train.py", *NANO, "budget=0.8", f"run_dir={name}")
        with (copy / name / "timings.csv").open() as file:
            return {row["what"]: row["cached"] for row in csv.DictReader(file) if row["what"] in EVERY}

    assert set(cached("first").values()) == {"False"}
    for name in HARMLESS:
        edit(copy, name)
    assert set(cached("again").values()) == {"True"}
    edit(copy, "elastic/sampler/within_batch.py")
    found = cached("sampler")
    assert {name for name, is_cached in found.items() if is_cached == "False"} == {
        "elastic", "router", "joint", "evaluate",
    }  # fmt: skip


def test_the_pipeline_imports_nothing_that_is_done_after_results():
    reached = {name.split(".")[1] for name in closure(pipeline_modules(), packages=frozenset({PACKAGE})) if "." in name}
    assert not reached & {"report", "estimate", "export", "generation", "api", "config", "cli"}
