"""The sweep files, by wandb's own schema, search, agent's command line, and a run of that command."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import processes
from nestlm.config.compose import build, compose
from nestlm.errors import ConfigError
from nestlm.pipeline.checks import check
from plugins import NANO
from wandb_files import history, records

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pydantic, for the way in which sweeps declares its models
    sweeps = pytest.importorskip("sweeps", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
# What the shortened run of a file needs besides.
SHORT = {"elastic": ["elastic_probe_steps=2"], "latency": ["budget=1.0", "router.steps=6"]}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def sample(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of a sweep's first run, as wandb's search draws them."""
    run = sweeps.next_run(sweeps.SweepConfig(copy.deepcopy(config)), [])
    assert run is not None
    return json.loads(json.dumps(run.config, default=lambda number: number.item()))  # as a server sends them


def agent_command(config: dict[str, Any], parameters: dict[str, dict[str, Any]]) -> list[str]:
    """What `wandb agent` starts, as its `_command_run` puts it together."""
    values = create_sweep_command_args({"args": parameters})
    values |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [config["program"]]}
    command: list[str] = []
    for part in create_sweep_command(list(config["command"])):
        is_macro = part.startswith("${") and part.endswith("}")
        command += values[part[2:-1]] if is_macro else [part]
    return command


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_accepts_the_file_and_we_its_overrides(path):
    config = read(path)
    assert sweeps.schema_violations_from_proposed_config(config) == []
    command = agent_command(config, sample(config))
    assert command[:3] == ["/usr/bin/env", "python", "train.py"]
    assert (ROOT / command[2]).is_file()
    assert not [part for part in command[3:] if part.startswith("-") or "=" not in part]
    check(build(compose(command[3:])))
    if config["method"] == "grid":  # every value of every parameter composes, too
        for name, parameter in config["parameters"].items():
            for value in parameter["values"]:
                check(build(compose([*command[3:], f"{name}={value}"])))


def test_a_misspelled_parameter_is_refused():
    config = read(ROOT / "sweeps/elastic.yaml")
    config["parameters"]["elastic.lrr"] = config["parameters"].pop("elastic.lr")
    command = agent_command(config, sample(config))
    with pytest.raises(Exception, match=r"elastic\.lrr"):
        build(compose(command[3:]))
    with pytest.raises(ConfigError, match=r"elastic\.lrr"):
        build(compose([part.replace("elastic.lrr", "+elastic.lrr") for part in command[3:]]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_agents_command_logs_the_sweeps_metric(path, tmp_path):
    """The command of a sweep's first run, shortened, in an agent's environment but for the account."""
    config = read(path)
    parameters = sample(config)
    locked = tmp_path / "parameters.yaml"
    locked.write_text(yaml.safe_dump({"wandb_version": 1} | parameters))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep",
        "WANDB_SWEEP_PARAM_PATH": str(locked),
    }
    folders = [f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
    short = [*agent_command(config, parameters), *NANO, *SHORT.get(path.stem, []), *folders]
    if path == FILES[0]:
        finished = subprocess.run(short, cwd=ROOT, env=environment, capture_output=True, text=True)
    else:
        finished = processes.run([sys.executable, *short[2:]], cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr
    values = history(tmp_path / "run")[config["metric"]["name"]]
    assert len(values) >= (2 if "early_terminate" in config else 1)
    (run,) = (record.run for record in records(tmp_path / "run") if record.HasField("run"))
    assert run.sweep_id == "sweep"
