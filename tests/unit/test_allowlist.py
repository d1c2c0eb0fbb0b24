"""A config can name the classes that a field wants, and no other code: nothing else is imported, nothing runs."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import nestlm
from nestlm.config import commands
from nestlm.config.allowlist import FOREIGN, FUNCTIONS, PLUGINS, import_object
from nestlm.config.compose import build, compose, settings_of
from nestlm.errors import ConfigError, NestlmError, NotAllowedError
from plugins import CONF, NANO
from runs import run_folder

# Code that others have; what is not installed here must be refused all the same.
DANGEROUS = [
    "os.system", "os.symlink", "os.getcwd", "subprocess.run", "builtins.eval", "builtins.exec", "shutil.rmtree",
    "torch.load", "joblib.load", "numpy.load", "numpy.testing.runstring", "pickle.loads", "hydra.utils.instantiate",
    "yaml.unsafe_load", "functools.partial", "importlib.import_module", "pathlib.Path.touch", "torch.hub.load",
    "lightning.fabric.Fabric", "lightning.pytorch.callbacks.ModelCheckpoint", "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LambdaLR",
    # names in modules of ours that they did not define, or that are no class of the field's type
    "nestlm.pipeline.run.shutil.rmtree", "nestlm.api.run_and_report.describe", "nestlm.cli.app.main",
    "nestlm.train.stage_settings.Trainer",
    "nestlm.train.stage_settings.torch.load", "nestlm.config.instantiate.build", "nestlm.config.commands.train",
    "nestlm.model.pretrained.family_from_checkpoint",
    "nestlm.report.page.Path", "nestlm.errors.NestlmError", "nestlm.config.sweep.CheckSweep", "nestlm.cost.table.Cost",
    # no names
    "", ".", "os", "system", "..os.system", ".os.system", "os..system", "os.system ", "os.system\n", "os/system",
    "os:system", "os.system()", "__import__('os').system", "\u043es.system", "nestlm.../os.system", "x." * 40 + "y",
    None, 5, 1.5, True, ["os.system"], {"_target_": "os.getcwd"},
]  # fmt: skip
MARKER = "marker_module"
CONFIGS = [
    NANO,
    [*NANO, "router=value", "axes=mlp_heads_depth", "sampler=one", "data=text", "data.path=.", "cost=latency"],
    [*NANO, "router=gumbel", "optim=adamw_bf16", "logger=wandb", "trainer=fsdp", "model=llama3_1_8b", "ranking=none"],
]


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A module that could be imported; whether it was."""
    code = f"open({str(tmp_path / 'touched')!r}, 'w').close()\nclass Sampler:\n    def draw(self): ...\n"
    (tmp_path / f"{MARKER}.py").write_text(code + "Loaded = touch = Sampler\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "touched"
    sys.modules.pop(MARKER, None)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a config."""
    if path:
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def changed(config: dict, path: tuple[Any, ...], value: Any) -> dict:
    config = copy.deepcopy(config)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return config


@pytest.mark.parametrize("overrides", CONFIGS, ids=["static", "text", "fsdp"])
def test_no_place_of_a_config_takes_foreign_code(overrides, marker):
    config = compose(overrides)
    nodes = [path[:-1] for path in places(config) if path[-1] == "_target_"]
    assert len(nodes) > 15
    for path in places(config):
        targets = [f"{MARKER}.touch"] if path[-1] == "_target_" else []
        node = {"_target_": f"{MARKER}.Sampler"}
        for value in (*targets, {**node, "_partial_": len(path) % 2 == 0}, [node], {"x": node}):
            with pytest.raises(ConfigError) as refused:
                build(changed(config, path, value))
            assert len(str(refused.value).splitlines()) == 1
    for path in nodes:
        for key in ("_args_", "_recursive_", "_convert_", "_x_"):
            with pytest.raises(NotAllowedError, match=key):
                build(changed(config, (*path, key), ["touch"]))
    assert not marker.exists(), "it was imported"


@pytest.mark.parametrize("target", DANGEROUS, ids=repr)
def test_a_run_folder_names_no_dangerous_code(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    config = compose(NANO)
    nodes = [path[:-1] for path in places(config) if path[-1] == "_target_"]
    files = sorted(tmp_path.rglob("*"))
    for path in nodes:
        with pytest.raises(NestlmError) as refused:
            build(changed(config, (*path, "_target_"), target))
        message = str(refused.value)
        assert len(message.splitlines()) == 1
        assert message.startswith(".".join(map(str, path)))
        assert len(message) < 500
    with pytest.raises(ConfigError, match="_target_"):
        build(config | {"_target_": target})
    assert sorted(tmp_path.rglob("*")) == files
    package = str(target).partition(".")[0]
    assert package == "nestlm" or package not in {name.partition(".")[0] for name in set(sys.modules) - before}


@pytest.mark.parametrize("door", [nestlm.load, settings_of, lambda run: commands.verify(run, out=None, tolerance=0.0)])
def test_every_way_to_open_a_run_refuses_it(door, tmp_path, marker, capsys):
    config = changed(compose(NANO), ("sampler", "_target_"), f"{MARKER}.Sampler")
    config["plugins"] = []
    with pytest.raises((NotAllowedError, SystemExit)) as refused:
        door(run_folder(tmp_path / "run", config))
    said = f"{refused.value}{capsys.readouterr().err}"
    assert f"{tmp_path / 'run' / 'config.yaml'}: sampler._target_" in said
    assert f"'{MARKER}.Sampler' is not allowed" in said
    assert not marker.exists()


def test_the_command_line_refuses_it_in_one_line(tmp_path, marker):
    run = run_folder(tmp_path / "run", changed(compose(NANO), ("trainer", "_target_"), f"{MARKER}.touch"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "nestlm", "generate", str(run), "--prompt", "x"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert f"trainer._target_: '{MARKER}.touch' is not allowed" in line
    assert not marker.exists()


PACKAGE = """
from pathlib import Path
from nestlm.elastic.sampler.one import One

Path(__file__).with_name("touched").touch()

class Mine(One):
    pass

class Other:
    pass

def make() -> One: ...
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's own package; the file that its import leaves."""
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/__init__.py").write_text(PACKAGE, encoding="utf-8")
    (tmp_path / "own_package_2.py").write_text(PACKAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(PLUGINS, raising=False)
    yield tmp_path / "own_package/touched"
    for name in ("own_package", "own_package_2"):
        sys.modules.pop(name, None)


OWN = [*NANO, "sampler=one", "sampler._target_=own_package.Mine"]


def test_a_package_of_ones_own_takes_part_where_the_command_line_names_it(package, monkeypatch, capsys):
    for named in ([], ["plugins=[own]"], ["plugins=[own_package_2]"], ["plugins=[os]"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *OWN, *named, "dry_run=true"])
        with pytest.raises(SystemExit) as exit_:
            commands.train()
        assert exit_.value.code == 2
        assert "plugins=[own_package]" in capsys.readouterr().err
        assert not package.exists()
    monkeypatch.setattr(sys, "argv", ["train.py", *OWN, "plugins=[own_package]", "dry_run=true"])
    commands.train()
    assert "search space" in capsys.readouterr().out
    assert package.exists()


def test_a_run_folder_does_not_allow_a_package_by_itself(package, tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run", compose([*OWN, "plugins=[own_package]"]))
    for _ in range(2):
        with pytest.raises(NotAllowedError, match=f"{PLUGINS}=own_package"):
            settings_of(run)
        monkeypatch.setenv(PLUGINS, "own,own_package_2")
    assert not package.exists()
    monkeypatch.setenv(PLUGINS, "other,own_package")
    assert type(settings_of(run)[0].sampler).__name__ == "Mine"
    monkeypatch.delenv(PLUGINS)
    assert type(settings_of(run, plugins=["own_package"])[0].sampler).__name__ == "Mine"


@pytest.mark.parametrize("name", ["Other", "make", "Path", "One"])
def test_a_class_of_a_package_suits_its_field(name, package):
    with pytest.raises(NotAllowedError, match="no Sampler"):
        build(compose([*OWN, f"sampler._target_=own_package.{name}"]), plugins=["own_package"])


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=marker_module.touch",
        "hydra.callbacks.check_sweep._target_=marker_module.touch",
        "hydra.launcher._target_=marker_module.touch",
        "hydra.launcher._target_=hydra_plugins.marker_module.touch",
        "hydra.sweeper._target_=marker_module.touch",
        "+hydra.sweeper.sampler._target_=marker_module.touch",
        "+hydra.sweeper.custom_search_space=marker_module.touch",
        "hydra.callbacks.check_sweep=${sampler}",
        "+hydra.job_logging.handlers.x.class=marker_module.touch",
        "+hydra.hydra_logging.formatters.x.factory=marker_module.touch",
        "+hydra.job_logging.handlers.x.stream=ext://marker_module.touch",
    ],
)
@pytest.mark.parametrize("mode", [[], ["-m", "seed=0"]], ids=["run", "sweep"])
def test_hydra_itself_makes_nothing_else(override, mode, marker, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *mode, override, "dry_run=true"])
    with pytest.raises(SystemExit) as exit_:
        commands.train()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: hydra.")
    assert "not allowed" in line
    assert not marker.exists()


def test_a_pickle_of_hydra_is_not_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", "--experimental-rerun", str(tmp_path / "config.pickle")])
    with pytest.raises(SystemExit) as exit_:
        commands.train()
    assert exit_.value.code == 2
    assert "pickle" in capsys.readouterr().err


def test_what_is_listed_exists():
    for names in FOREIGN.values():
        for name in names:
            if not name.startswith("torchao."):  # an extra
                assert isinstance(import_object(name, where="x"), type)
    for name, kind in FUNCTIONS.items():
        assert callable(import_object(name, where="x"))
        assert isinstance(import_object(kind, where="x"), type)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("trainer", "plugins"), ["a"]),
        (("trainer", "callbacks"), []),
        (("trainer", "default_root_dir"), "/tmp/elsewhere"),
        (("trainer", "logger"), True),
        (("trainer", "profiler"), "advanced"),
        (("trainer", "model_registry"), "x"),
        (("trainer", "strategy"), "ddp"),
        (("logger", "save_dir"), "/tmp/elsewhere"),
        (("optim", "optimizer", "params"), []),
        (("optim", "optimizer", "lr"), 1.0),
        (("router", "network", "prices"), None),
    ],
)
def test_what_the_stages_decide_is_not_the_configs(path, value):
    with pytest.raises(ConfigError, match="^" + ".".join(path)):
        build(changed(compose(NANO), path, value))


def test_a_config_that_is_no_config_is_refused():
    loop: list[Any] = []
    loop.extend([loop, loop])
    many: list[Any] = [0]
    for _ in range(12):
        many = [many] * 10
    config = compose(NANO)
    for value in (loop, many, {1: 2}, b"bytes", {"a"}, 10**400, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"^label"):
            build(config | {"label": value})


def test_every_shipped_class_is_allowed():
    """Also those that no test composes: each `_target_` of each file is ours or listed."""
    listed = {name for names in FOREIGN.values() for name in names}
    for path in CONF.rglob("*.yaml"):
        for name in named(yaml.safe_load(path.read_text(encoding="utf-8"))):
            assert name.startswith("nestlm.") or name in listed, path


def named(node: Any) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from [value] if key == "_target_" else named(value)
