"""`nestlm generate`, the five lines of the README, and how fast commands start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import nestlm
from nestlm.cli.app import app
from nestlm.errors import BudgetError, ConfigError, DataError
from nestlm.generation.sampling import Sampling

ROOT = Path(__file__).parents[2]


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def python(script: str) -> subprocess.CompletedProcess:
    """A process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_a_continuation_is_written_as_it_comes(static_run):
    drawn = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--max-tokens", "9"]
    done = command(static_run, "--budget", "0.7+0.9params", "--prompt", "the cat", *drawn)
    assert done.exit_code == 0, done.output
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5)
    model = nestlm.load(static_run)
    wanted = model.generate("the cat", budget=["0.7", "0.9params"], max_tokens=9, sampling=sampling)
    assert done.stdout == wanted + "\n"
    assert re.search(
        r"budget 0.7\+0.9params: surrogate-static, 0\.\d{4} of the cost, \d tokens, .*tokens/s", done.stderr
    )
    assert wanted != model.generate("the cat", budget=["0.7", "0.9params"], max_tokens=9)


def test_names_of_special_tokens_in_a_prompt(static_run):
    """They are plain text, and named once, unless they are to be special tokens."""
    model, prompt = nestlm.load(static_run), "<|endoftext|>the cat"
    options = ["--prompt", prompt, "--max-tokens", "4"]
    plain, special = command(static_run, *options), command(static_run, *options, "--special-tokens")
    for done in (plain, special, command(static_run, *options, "--compare", "1.0,0.8")):
        assert done.exit_code == 0, done.output
        warned = "prompt: holds <|endoftext|>: names of special tokens, taken as plain text; special_tokens=True"
        assert done.stderr.count(warned) == (done is not special)
    assert special.stdout == model.generate(prompt, max_tokens=4, special_tokens=True) + "\n"
    assert model.encode(prompt, special_tokens=True) == model.encode("the cat"), "it brought its own begin token"
    assert len(model.encode(prompt)) > len(model.encode("the cat")) + 1


def test_output_that_cannot_be_shown_or_is_not_read(static_run):
    """A terminal without the characters, and a reader that has gone."""
    arguments = ["generate", str(static_run), "--prompt", "the cat", "--max-tokens", "60", "--temperature", "5"]
    script = f"import sys; sys.argv[1:] = {arguments!r}; from nestlm.__main__ import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "\\ufffd" in shown.stdout
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 1


def test_continuations_side_by_side(dynamic_run):
    done = command(dynamic_run, "--compare", "1.0,0.8,0.7", "--prompt", "the cat", "--max-tokens", "5")
    assert done.exit_code == 0, done.output
    for part in ("budget 1 ", "budget 0.8", "budget 0.7", "surrogate-dynamic", "5 tokens"):
        assert part in done.stdout
    assert done.stdout.count("tokens/s") == 3
    static = command(dynamic_run, "--budget", "0.7", "--prompt", "the cat", "--router", "static", "--max-tokens", "2")
    assert "budget 0.7: knapsack, " in static.stderr


def test_rows_of_a_batch_are_their_own_single_runs(static_run, dynamic_run):
    """Through the tokenizer, a run's own router, and budgets that it was not asked for."""
    prompts = ["the cat", "", "a road and then the old house"]
    for folder, budgets in ((static_run, [1.0, 0.66, 0.8]), (dynamic_run, [0.8, 1.0, 0.7])):
        model = nestlm.load(folder)
        options = {"max_tokens": 12, "sampling": Sampling(temperature=0.7, seed=2)}
        alone = [model.generate(text, budget=budget, **options) for text, budget in zip(prompts, budgets, strict=True)]
        assert model.generate_batch(prompts, budgets=budgets, **options) == alone
        assert len(set(alone)) == 3
        with pytest.raises(ConfigError, match="budgets: got 2 for 3 prompts, wanted one a prompt"):
            model.generate_batch(prompts, budgets=[0.8, 0.8])


def test_bad_input_is_named_and_ends_with_its_exit_code(static_run, tmp_path):
    for arguments, error, said in (
        ((static_run, "--budget", "0.1"), BudgetError, "ask for at least that"),
        ((static_run, "--budget", "much"), BudgetError, "budget: got 'much'"),
        ((static_run, "--prompt", "the " * 300), DataError, "wanted at most model.context_length="),
        ((static_run, "--prompt", "a\udcff"), DataError, "is no Unicode text"),
        ((static_run, "--router", "dynamic"), ConfigError, "the run's router is surrogate-static"),
        ((static_run, "--top-p", "2"), ConfigError, "top_p: got 2.0"),
        ((tmp_path,), DataError, "is no finished run"),
    ):
        given = [] if "--prompt" in arguments else ["--prompt", "the cat"]
        done = command(*arguments, *given)
        assert isinstance(done.exception, error)
        assert said in str(done.exception)
    script = (
        "import sys; from nestlm.__main__ import main; sys.argv[1:] = ['generate', 'nowhere', '--prompt', 'a']; main()"
    )
    done = python(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere is no finished run; wanted the folder that a run printed at its end\n"


def test_help_and_refusals_need_no_torch():
    """Importing it takes longer than all that they do; every command shows an example."""
    script = f"""
import sys
from typer.testing import CliRunner
from nestlm.cli.app import app
for arguments in ([], {", ".join(f"['{name}']" for name in get_command(app).commands)}):
    shown = CliRunner().invoke(app, [*arguments, '--help'])
    assert shown.exit_code == 0
    assert not arguments or f'Example: nestlm {{arguments[0]}}' in ' '.join(shown.output.split()), arguments
refused = CliRunner().invoke(app, ['generate', 'nowhere', '--prompt', 'a'])
assert 'is no finished run' in str(refused.exception), refused
heavy = [name for name in ('torch', 'lightning', 'transformers', 'numpy') if name in sys.modules]
assert not heavy, heavy
"""
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_the_lines_of_the_readme_run(static_run, tmp_path, monkeypatch, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    assert lines.count("runs/default/RUN") == 1
    exec(lines.replace("runs/default/RUN", str(static_run)), {})
    assert "val_loss" in capsys.readouterr().out
    assert (tmp_path / "small/config.json").is_file()
