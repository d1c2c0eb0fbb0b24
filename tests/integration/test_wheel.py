"""A wheel of the project works alone: its configs travel in it, and the commands do what those of a checkout do."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nestlm.report.tables import read_csv
from plugins import CONF, stages_that_ran

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
INSIDE = OUTSIDE | {"PYTHONPATH": str(ROOT / "src")}


def call(*command: object, cwd: Path, env: dict[str, str] = OUTSIDE) -> subprocess.CompletedProcess[str]:
    """Run a command, to which the checkout is not importable unless `env` is INSIDE."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """The scripts' folder of a new environment with the wheel in it, which finds other packages in this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "conf", source / "conf")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    built = call(*PIP, *build, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    venv.create(folder / "environment", symlinks=True)
    python = folder / "environment/bin/python"
    (wheel,) = folder.glob("nestlm-*.whl")
    installed = call(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    (packages,) = (folder / "environment/lib").glob("python*/site-packages")
    # a path alone: the .pth files in that folder, such as that of an editable install, are not read
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    place = call(python, "-c", "import nestlm; print(nestlm.__file__)", cwd=folder).stdout.strip()
    assert Path(place) == packages / "nestlm/__init__.py"
    return python.parent


def test_the_wheel_holds_every_config(scripts):
    (conf,) = scripts.parent.glob("lib/python*/site-packages/nestlm/conf")
    packed, own = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.yaml")} for folder in (conf, CONF)
    )
    assert packed == own


@pytest.mark.parametrize(
    "arguments",
    [
        ["debug=smoke", "dry_run=true"],
        ["--cfg", "job", "--package", "data"],
        ["modle=tiny"],
        ["-m", "router=glob(zzz*)"],
        pytest.param(["--help"], marks=pytest.mark.slow),
        pytest.param(["sampler._target_=os.system"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_train_says_what_train_py_says(arguments, scripts, tmp_path):
    done = call(scripts / "nestlm", "train", *arguments, cwd=tmp_path)
    wanted = call(sys.executable, ROOT / "train.py", *arguments, cwd=tmp_path, env=INSIDE)
    assert (done.stdout, done.stderr, done.returncode) == (wanted.stdout, wanted.stderr, wanted.returncode)


@pytest.mark.slow
def test_a_launcher_starts_jobs(scripts, tmp_path):
    """Each job in a process of its own. They print at the same time, so lines are compared in no order."""
    sweep = ["-m", "debug=smoke", "dry_run=true", "seed=0,1", "launcher=joblib"]
    done = call(scripts / "nestlm", "train", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = call(sys.executable, ROOT / "train.py", *sweep, cwd=tmp_path, env=INSIDE)
    assert sorted(done.stdout.splitlines()) == sorted(wanted.stdout.splitlines())


def test_the_module_is_the_command(scripts, tmp_path):
    done = call(scripts / "nestlm", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "consolidate" in done.stdout
    assert call(scripts / "python", "-m", "nestlm", "--help", cwd=tmp_path).stdout == done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_trained_generated_from_exported_and_found_in_the_cache_of_a_checkout(scripts, tmp_path):
    nestlm = scripts / "nestlm"
    smoke = ["debug=smoke", f"cache_dir={tmp_path / 'cache'}"]
    trained = call(nestlm, "train", *smoke, "run_dir=run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert len(read_csv(tmp_path / "run/results.csv")) == 10
    generated = call(nestlm, "generate", "run", "--budget", "0.6", "--prompt", "def ", "--max-tokens", 4, cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    exported = call(nestlm, "export", "run", "--budget", "0.6", "--out", "small", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "small/model.safetensors").is_file()
    again = call(sys.executable, ROOT / "train.py", *smoke, "run_dir=again", cwd=tmp_path, env=INSIDE)
    assert again.returncode == 0, again.stderr
    assert stages_that_ran(tmp_path / "again") == [], "the cache keys of a checkout are the wheel's"
    assert (tmp_path / "again/results.csv").read_bytes() == (tmp_path / "run/results.csv").read_bytes()
