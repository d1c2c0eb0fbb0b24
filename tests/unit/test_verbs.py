"""Every verb of `nestlm`, found by itself; the start of the command; completion in shells."""

import os
import pkgutil
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import typer.main
from typer.testing import CliRunner

from nestlm.cli import verbs
from nestlm.cli.app import VERBS, app

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue] (it is a group)


def test_every_module_of_a_verb_is_registered():
    assert sorted(VERBS) == sorted(info.name for info in pkgutil.iter_modules(verbs.__path__)) == sorted(COMMANDS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself_and_all_that_it_takes(verb):
    text = getattr(import_module(f"nestlm.cli.verbs.{verb}"), verb).__doc__
    assert f"Example: nestlm {verb} " in text
    assert len(text.splitlines()[0]) < 120
    for parameter in COMMANDS[verb].params:
        if parameter.name != "help":
            assert parameter.help, parameter.name
            assert parameter.help.endswith("."), parameter.name


def test_an_absent_argument_is_named():
    done = CliRunner().invoke(app, ["export"])
    assert done.exit_code == 2
    assert "Missing" in done.output


def test_the_command_starts_without_heavy_imports():
    """`--help` and completion are to come at once."""
    code = (
        "import sys, nestlm.cli.app; print(*{'torch', 'hydra', 'lightning', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def script(shell: str, folder) -> str:
    """What `nestlm --show-completion` prints in a shell, for a `nestlm` in a folder of its own."""
    command = folder / "nestlm"
    command.write_text(f"#!{sys.executable}\nfrom nestlm.__main__ import main\nmain()\n", encoding="utf-8")
    command.chmod(0o755)
    environment = os.environ | {"_NESTLM_COMPLETE": f"source_{shell}"}
    return subprocess.run([command], env=environment, capture_output=True, text=True, check=True).stdout


def run_in(shell: str, code: str, folder) -> list[str]:
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [shell, "-c", code], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


COMPLETIONS = {"nestlm ex": ["export"], "nestlm generate --max": ["--max-tokens"]}


@pytest.mark.parametrize("line", COMPLETIONS)
def test_bash_completes(line, tmp_path):
    words = line.split()
    code = f"""{script("bash", tmp_path)}
    COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}
    $(complete -p nestlm | sed 's/.*-F \\([^ ]*\\) .*/\\1/') nestlm
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    assert run_in("bash", code, tmp_path) == COMPLETIONS[line]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize("line", COMPLETIONS)
def test_zsh_completes(line, tmp_path):
    """Completion functions run at a prompt alone, so the one that shows what was found is replaced."""
    code = f"""compdef() {{ function=$1 }}
    _arguments() {{ print -r -- "$@" }}
    {script("zsh", tmp_path)}
    words=({line}) CURRENT={len(line.split())}
    $function
    """
    found = " ".join(run_in("zsh", code, tmp_path))
    assert COMPLETIONS[line][0] in found
    assert "consolidate" not in found
