"""What a user can misspell, mistype or ask too much of: one or two lines, exit code 2, nothing loaded."""

import subprocess
import sys

import pytest

from nestlm.api.reproduce import read
from nestlm.config.commands import train
from nestlm.config.compose import build, compose
from plugins import CONF, MIXTURE, NANO, choose, options
from runs import run_folder
from schema_overrides import tried

# overrides, and what the message has to say
MISTAKES = {
    "group": (["modle=tiny"], ["modle", "'model'"]),
    "option": (["model=tinny"], ["tinny", "'tiny'", "llama2_7b"]),
    "field": (["model.num_layer=3"], ["model.num_layer:", "'model.num_layers'"]),
    "top field": (["sed=3"], ["sed", "'seed'"]),
    "added field": (["+model.num_layer=3"], ["model.num_layer", "takes no", "'num_layers'"]),
    "target's argument": (["+router.network.hidden_widht=3"], ["hidden_widht", "'hidden_width'"]),
    "target's module": (["router.policy=statik"], ["statik", "'static'"]),
    "target": (["sampler._target_=nestlm.elastic.sampler.sandwich.Sandwhich"], ["Sandwhich", "'Sandwich'"]),
    "third party's argument": (["+optim.optimizer.beta=3"], ["optim.optimizer.beta", "'betas'"]),
    "syntax": (["model=[tiny"], ["[tiny"]),
    "type": (["seed=abc"], ["seed", "'abc'", "int"]),
    "nested type": (["optim.clip_norm=big"], ["optim.clip_norm", "'big'", "float"]),
    "truth for a number": (["pretrain.steps=true"], ["pretrain.steps", "True", "int"]),
    "fraction for a count": (["pretrain.steps=1.5"], ["pretrain.steps", "1.5", "int"]),
    "type in a list": (["axes.mlp_width.fractions=[a,1.0]"], ["axes.mlp_width.fractions", "float"]),
    "missing value": (["data=text"], ["data.path", "data.path=VALUE"]),
    "budget below the floor": (["budget=0.2"], ["0.2", "smallest sub-network costs 0."]),
    "budget above the model": (["budget=[0.5,1.2]"], ["1.2", "at most 1.0"]),
    "no budget": (["budget=fast"], ["fast", "wanted"]),
    "unknown unit": (["budget=3parsecs"], ["3parsecs", "wanted one of", "GiB"]),
    "time without latency": (["budget=12ms"], ["12ms", "wanted one of flops", "cost=latency"]),
    "memory above the model": (["budget=5GiB"], ["5GiB", "full model's memory is 0.00", "GiB; ask for at most"]),
    "memory below the floor": (["budget=[[0.9,0.0005GiB]]"], ["0.0005GiB", "smallest sub-network costs 0.00", "GiB;"]),
    "a cost's size": (["costs.memory.batch_size=0"], ["batch_size", "got 0", "positive"]),
    "a cost under another name": (["costs.flops=${cost}", "cost=params"], ["costs.flops", "costs.params"]),
    "negative budget": (["budget=-0.5"], ["-0.5", "above 0"]),
    "choices that round to zero": (["axes.attn_heads.fractions=[0.1,1.0]"], ["rounds to 0", "raise the fraction"]),
    "choices that round to zero under GQA": (["model.num_kv_groups=1"], ["rounds to 0"]),
    "size zero": (["model.num_layers=0"], ["model.num_layers", "got 0", "positive"]),
    "negative size": (["model.hidden_size=-4"], ["model.hidden_size", "-4", "positive"]),
    "sizes that don't divide": (["model.num_kv_groups=3"], ["model.num_kv_groups", "got 3", "num_heads=4"]),
    "odd heads": (["model.head_dim=7"], ["model.head_dim", "got 7", "even"]),
    "negative steps": (["elastic.steps=-1"], ["elastic.steps", "-1"]),
    "negative rate": (["elastic.lr=-1.0"], ["elastic.lr", "-1"]),
    "batch size": (["data.batch_size=0"], ["data.batch_size", "got 0", "positive"]),
    "batch size that does not divide": (["trainer.devices=3"], ["data.batch_size", "got 8", "3 ranks"]),
    "no such device": (["trainer.accelerator=cuda"], ["trainer", "CUDA"]),
    "sampler=uniform sampler.num_random=0 sampler.full=false": (
        ["sampler=uniform", "sampler.num_random=0", "sampler.full=false"], ["num_random"]),
    "sampler.num_random=-1": (["sampler.num_random=-1"], ["num_random"]),
    "sampler=one sampler.p_full=7": (["sampler=one", "sampler.p_full=7"], ["p_full"]),
    "teacher.ce_share=4": (["teacher.ce_share=4"], ["ce_share"]),
    "joint.budgets_per_step=-3": (["joint.budgets_per_step=-3"], ["joint.budgets_per_step"]),
    "ranking.num_sequences=0": (["ranking.num_sequences=0"], ["num_sequences"]),
    "router.network.hidden_width=0": (["router.network.hidden_width=0"], ["hidden_width"]),
    "router.network.hidden_width=-1": (["router.network.hidden_width=-1"], ["hidden_width"]),
    "optim.optimizer.betas=[2,3]": (["optim.optimizer.betas=[2,3]"], ["optim.optimizer"]),
    "+trainer.gradient_clip_val=1.0": (["+trainer.gradient_clip_val=1.0"], ["gradient_clip_val"]),
    "+trainer.max_steps=1": (["+trainer.max_steps=1"], ["max_steps"]),
    "trainer.devices=2": (["trainer.devices=2"], ["trainer.devices"]),
    "seed=99999999999999999999999": (["seed=99999999999999999999999"], ["seed"]),
    "two ways to time": (
        ["cost=latency", "+cost@costs.latency=latency", "costs.latency.phase=decode"], ["costs.latency", "leave one"]
    ),
    "run_dir=/dev/null/x": (["run_dir=/dev/null/x"], ["run_dir"]),
    "model.rope_theta=-1": (["model.rope_theta=-1"], ["rope_theta"]),
    "a mixture's weight": (
        ["data=mixture", "data.sources=[{path: a, weight: 0}]"], ["data.sources", "'weight': 0", "positive"]
    ),
    "a mixture's key": (["data=mixture", "data.sources=[{path: a, share: 1}]"], ["data.sources", "share", "weight"]),
    "a mixture of nothing": (["data=mixture", "data.sources=[]"], ["data.sources", "got none"]),
    "a split of what is split": (
        ["data=shards", "data.path=a", "data.heldout_share=0.1"],
        ["data.heldout_share", "chosen option of data has no such field"],
    ),
    "workers of a stream": (
        ["data=hf_streaming", "data.path=a", "data.num_workers=2"], ["data.num_workers", "chosen option"]
    ),
    "workers of a stream, added": (
        ["data=hf_streaming", "data.path=a", "+data.num_workers=2"], ["data.num_workers: got 2", "read in one place"]
    ),
    "text for a ranking that reads none": (
        ["ranking=random", "ranking.num_sequences=8"], ["ranking.num_sequences", "chosen option of ranking"]
    ),
    "absent shards": (["data=shards", "data.path=/does/not/exist"], ["/does/not/exist", "manifest.json", "prepare"]),
    "absent path": (["data.path=/does/not/exist"], ["/does/not/exist", "no folder"]),
    "data=stdlib data.path=/x": (["data=stdlib", "data.path=/x"], ["data.path"]),
    "data.tokenizer=/nope": (["data.tokenizer=/nope"], ["/nope"]),
    "long rows": (["data.sequence_length=512"], ["512", "model.context_length=256"]),
    "absent folder": (["data=text", "data.path=/does/not/exist"], ["/does/not/exist", "no folder"]),
    "absent weights": (["model.weights=/does/not/exist"], ["model.weights", "/does/not/exist", "no folder"]),
    "size without weights": (["model=llama2_7b"], ["model.weights=FOLDER", "model.init=random"]),
    "wrong init": (["model.init=zeros"], ["model.init", "'zeros'", "random"]),
    "launcher": (["launcher=jobib"], ["launcher", "'joblib'", "submitit_local"]),
    "sweep of no options": (["-m", "router=glob(zzz*)", "seed=0,1"], ["router=glob(zzz*)", "no job", "knapsack"]),
    "sweep of no values": (["-m", "seed=range(0,0)"], ["seed=range(0,0)", "no job"]),
    "sweep of an absent group": (["-m", "+experiment/nope=glob(*)"], ["experiment/nope=glob(*)", "no job"]),
    "a group without an option": (["~trainer"], ["trainer", "has no value"]),
    "no key": (["=5"], ["=5: wanted GROUP=NAME or FIELD=VALUE"]),
    "nothing to delete": (["~"], ["~: wanted GROUP=NAME or FIELD=VALUE"]),
    "a number for a launcher": (["hydra/launcher=5"], ["hydra/launcher: got 5", "joblib"]),
    "a number for a group below": (["+experiment/ablation=5"], ["experiment/ablation: got 5, wanted a name"]),
    "null for a group": (["model=null"], ["model: got null", "wanted one of", "tiny"]),
    "a number for a group": (["sampler=5"], ["sampler: got 5", "sandwich"]),
    "a list for a group": (["router=[1]"], ["router: got [1]", "surrogate"]),
    "null for a kind": (["costs.flops=null"], ["costs.flops", "got None", "Cost"]),
    "null for all kinds": (["costs=null"], ["costs", "got None"]),
    "no axes": (["~axes.mlp_width", "~axes.attn_heads"], ["axes: got none"]),
    "a number for an axis": (["+axes.foo=1"], ["axes.foo: got 1", "Axis"]),
    "no name": (["sampler._target_="], ["sampler._target_: got ''", "dotted name"]),
    "code": (["sampler._target_=os.system"], ["sampler._target_: 'os.system' is not allowed"]),
    "no devices": (["trainer.devices=0"], ["trainer", "devices"]),
    "all devices of a CPU": (["trainer.devices=-1"], ["trainer", "devices"]),
    "unknown devices": (["trainer.devices=x"], ["trainer", "devices"]),
    "a rate of the optimizer's own": (["+optim.optimizer.lr=1"], ["optim.optimizer.lr", "stages", "STAGE.lr"]),
    "a field twice": (["+seed=1"], ["seed"]),
    "an interpolation to nowhere": (["seed=${foo}"], ["seed", "'foo' not found"]),
    "a variable that is not set": (["seed=${oc.env:NESTLM_NO_SUCH}"], ["seed", "NESTLM_NO_SUCH"]),
    "a precision": (["trainer.precision=64-true"], ["trainer.precision", "'64-true'", "bf16-mixed"]),
    "not a number": (["pretrain.lr=nan"], ["pretrain.lr: got nan", "finite"]),
    "too large for a number": (["joint.dead_zone=1e400"], ["joint.dead_zone", "finite"]),
    "a negative context": (["cost.context_length=-1"], ["cost.context_length: got -1", "positive"]),
    "a share above one": (["router.signal.random_share=2"], ["router.signal.random_share: got 2", "share"]),
    "a million layers": (["model.num_layers=1000000"], ["model.num_layers", "at most 1024"]),
    "a million budgets a step": (["joint.budgets_per_step=1000000"], ["joint.budgets_per_step", "at most 1000"]),
    "a budget that is no number": (["budget=nan"], ["budget"]),
    "a name above the runs": (["experiment_name=../x"], ["experiment_name: got '../x'", "ablation/router"]),
    "an absolute name": (["experiment_name=/tmp/x"], ["experiment_name: got '/tmp/x'"]),
    "a router's name with a path": (["router.name=../x"], ["router.name: got '../x'"]),
    "a long text": ([f"label={'x' * 10_000}"], ["label", "...", "255"]),
    "parentheses": (["data.path=a(b)"], ["data.path=a(b)", """'data.path="a(b)"'"""]),
    "an equals sign": (["data.path=a=b"], ["""'data.path="a=b"'"""]),
    "a number sign": (["data.path=a#b"], ["""'data.path="a#b"'"""]),
    "letters of another script": (["data.path=\u6570\u636e"], ["""'data.path="\u6570\u636e"'"""]),
    "a comma": (["data.path=a,b"], ["""'data.path="a,b"'""", "-m"]),
    "no assignment": (["seed"], ["seed: wanted GROUP=NAME"]),
    "no jobs at once": (["-m", "launcher=joblib", "hydra.launcher.n_jobs=0", "seed=0,1"], ["hydra.launcher.n_jobs"]),
    "a policy that a class lacks": (
        ["router.network._target_=nestlm.router.static.logits.StaticLogitsRouter", "router.policy=dynamic"],
        ["router.policy: got dynamic", "StaticLogitsRouter", "static only", "set router.policy=static"],
    ),
    "a policy of a router that learns nothing": (
        ["router=knapsack", "router.policy=dynamic"], ["router.policy: got dynamic", "set router.policy=static"]
    ),
    "surrogate's target": (["router.signal.target=gapp"], ["router.signal.target", "'gapp'", "gap, loss"]),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_in_two_lines(overrides, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    with pytest.raises(SystemExit) as exit_:
        train()
    printed = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) <= 2
    for part in expected:
        assert part in printed
    assert not (tmp_path / "cache").exists(), "nothing was started"


def test_what_the_schema_suggests_works_or_is_named():
    """A few of the overrides that the config's own keys suggest; more are tried by benchmarks/schema_overrides.py."""
    wrong = [(override, fault) for override, _, fault in tried([*NANO], number=30, seed=0) if fault]
    assert not wrong


@pytest.mark.parametrize(("override", "path"), [("'data.path=\"a(b)\"'", "a(b)"), ("2023", "2023"), ("a b", "a b")])
def test_a_path_of_any_letters_can_be_named(override, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).mkdir()
    value = override.strip("'").removeprefix("data.path=")
    settings = build(compose([*NANO, "data=text", f"data.path={value}"]))
    assert settings.data.path == path
    assert settings.data.source.path == path


def test_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(compose([*NANO, "data=text", 'data.path="~/text"'])).data.path == str(tmp_path / "text")


def test_fractions_whose_widths_meet_are_one_choice(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *NANO, "model.num_kv_groups=2", "budget=[1.0,0.7]", "dry_run=true"])
    train()
    printed = capsys.readouterr().out
    assert "attn_heads [1, 2]" in printed
    assert "4 fractions of attn_heads round to 2 widths" in printed


def test_the_traceback_is_there_on_demand(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "budget=7", "traceback=true"])
    with pytest.raises(ValueError, match="at most"):
        train()


def test_a_sweep_that_a_file_names_is_checked_too(monkeypatch, capsys, tmp_path):
    """A value on the command line goes before the file's."""
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept/none.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {router: glob(zzz*)}}}\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["train.py", "-m", "--config-dir", str(tmp_path), "+swept=none", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as exit_:
        train()
    assert exit_.value.code == 2
    assert "error: router=glob(zzz*)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "router=uniform"])
    train()
    assert "search space" in capsys.readouterr().out


def test_a_cluster_that_is_not_there_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "launcher=submitit", "seed=0,1"])
    with pytest.raises(SystemExit) as exit_:
        train()
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "no srun" in printed
    assert "launcher=submitit_local" in printed


@pytest.mark.parametrize("launcher", ["joblib", "submitit", "submitit_local"])
def test_a_launcher_without_its_package_is_one_line(launcher, tmp_path):
    """In a process of its own, where Hydra finds no plug-ins."""
    hidden = "import sys; sys.modules['hydra_plugins'] = None; from nestlm.config.commands import train; train()"
    command = [sys.executable, "-c", hidden, f"launcher={launcher}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: launcher: ")
    assert line.endswith("pip install 'nestlm[launchers]'")


@pytest.mark.parametrize("launcher", ["joblib", "submitit", "submitit_local"])
def test_a_launcher_changes_no_setting(launcher):
    """So that neither cache keys nor the run's folder depend on it."""
    assert compose([f"launcher={launcher}"]) == compose([])


@pytest.mark.parametrize(
    "name",
    [
        "llama2_7b",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama2_13b", "llama3_8b", "small")),
        "tiny",
    ],
)
def test_dry_run_needs_no_weights(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", f"model={name}", "router=surrogate", "dry_run=true"])
    train()
    printed = capsys.readouterr().out
    parameters = {
        "llama2_7b": "6,738,415,616",
        "llama2_13b": "13,015,864,320",
        "llama3_8b": "8,030,261,248",
        "tiny": "1,066,112",
    }
    assert parameters.get(name, "parameters") in printed
    for word in ("search space", "elastic", "router", "joint", "FLOPs"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_every_group_composes():
    for path in sorted(CONF.glob("*/*.yaml")):
        group, option = path.parent.name, path.stem
        if group in ("experiment", "debug"):
            build(compose([f"+{group}={option}" if group == "hydra" else f"{group}={option}"]))
        else:
            config = compose(choose(group, option))
            if option != "pretrained":  # needs a checkpoint to read: test_families.py
                assert build(config) is not None


CHOICES = {
    "several limits": ["budget=[[0.6,8GiB],60%,3.4e9params,0.7memory,0.5]", "label='1e3'", "elastic.lr=1e-9"],
    "time": ["cost=latency", "budget=12ms"],
    "time beside another": ["+cost@costs.latency=latency", "budget=[[0.9,1ms]]"],
    **{f"{group}={name}": [f"{group}={name}"] for group in ("router", "logger", "sampler") for name in options(group)},
    **{f"dynamic {name}": [f"router={name}", "router.policy=dynamic"] for name in ("surrogate", "gumbel", "value")},
    "per prompt": ["router=value", "router.granularity=prompt", "router.prompt_tokens=8"],
    "a folder of text": ["data=text", "data.path=."],
    "a mixture": MIXTURE,
}


@pytest.mark.parametrize("overrides", CHOICES.values(), ids=CHOICES)
def test_the_config_that_a_run_leaves_is_read_again(overrides, tmp_path):
    """As `nestlm verify` does; types count, so texts are compared."""
    plain = compose([*NANO, *overrides])
    run_folder(tmp_path, plain)
    again, _ = read(tmp_path)
    assert repr(again) == repr(plain)
    assert build(again).budgets == build(plain).budgets


def test_seed_zero_is_a_seed():
    plain = compose([*NANO, "seed=0"])
    assert plain["seed"] == 0
    assert plain["router"]["network"]["seed"] == 0
