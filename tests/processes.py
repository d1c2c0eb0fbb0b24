"""Commands in processes of their own.

A Python process that imports torch and Lightning takes several seconds to start. `run` and `start` fork a process that
has imported the third-party packages, so that a test of what a command does waits for nestlm's own imports alone. Tests
of how a process starts use `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# What nestlm imports; nothing of nestlm itself, which a command may import from another folder.
PRELOADED = [
    "hydra", "jinja2", "lightning", "lightning.pytorch", "lightning.pytorch.strategies", "matplotlib.figure",
    "omegaconf", "pydantic", "rich.progress", "rich.table", "safetensors.torch", "scipy.optimize", "tokenizers",
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.launcher.api",
    "torch.utils.data", "torchmetrics", "typer.testing",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


class Forked:
    """A command that runs, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, arguments: Sequence[str | Path], *, cwd: Path | str | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        interpreter, *self.arguments = map(str, arguments)
        assert interpreter == sys.executable
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        place = str(Path.cwd() if cwd is None else cwd)
        given = (self.arguments, place, dict(os.environ if env is None else env), [str(file) for file in self.files])
        self.process = SERVER.Process(target=work, args=given, daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return standard output and error."""
        self.wait(timeout)
        stdout, stderr = (file.read_text(encoding="utf-8") for file in self.files)
        return stdout, stderr


def start(arguments: Sequence[str | Path], **place) -> Forked:
    """Start `[sys.executable, SCRIPT, ...]`, or `-m MODULE` or `-c CODE` in its place."""
    return Forked(arguments, **place)


def run(arguments: Sequence[str | Path], *, check: bool = False, **place) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` with captured text."""
    job = Forked(arguments, **place)
    stdout, stderr = job.communicate()
    done = subprocess.CompletedProcess(job.arguments, job.wait(), stdout, stderr)
    if check:
        assert done.returncode == 0, stderr
    return done


def work(arguments: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Become the command: in the forked process."""
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.current_process()._config["daemon"] = False  # it may have children, as ranks are
    sys.path[:0] = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
    code = 1
    try:
        execute(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:  # noqa: BLE001 (shown as the interpreter shows it)
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(script: str, *arguments: str) -> None:
    """Run a script, a module or code as the interpreter does."""
    if script not in ("-m", "-c"):
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
        return
    what, *sys.argv[1:] = arguments
    sys.argv[0] = script
    sys.path.insert(0, "")
    if script == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def kill_when(arguments: list[str], condition: Callable[[], object], *, deadline: float = 120) -> None:
    """Start a run and kill it with SIGKILL as soon as the condition holds."""
    process = start(arguments)
    end = time.monotonic() + deadline
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
