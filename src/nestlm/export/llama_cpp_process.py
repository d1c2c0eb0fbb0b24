"""Run a GGUF file in llama.cpp, in a process of its own, since llama.cpp ends its process on an error."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

TOKENS, LOGITS = "tokens.npy", "logits.npy"


def llama_cpp_version() -> str | None:
    """Return the name and version of llama.cpp's Python package; None if it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"


def llama_cpp_logits(path: Path, tokens_BL: np.ndarray, *, threads: int) -> np.ndarray:
    """Compute the logits of a GGUF file with llama.cpp.

    Args:
        path: the file.
        tokens_BL: token ids.
        threads: number of CPU threads.

    Returns:
        Logits (B, L, V) in float32.

    Raises:
        ChildProcessError: llama.cpp cannot load or run the file. The message is the last line that it printed.
    """
    with TemporaryDirectory(prefix="nestlm-llama-") as scratch:
        np.save(Path(scratch, TOKENS), tokens_BL)
        # -P keeps this folder off sys.path, where a file could hide a package of the same name
        command = [sys.executable, "-P", __file__, str(path), scratch, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            raise ChildProcessError(f"exit code {done.returncode}, {said[-1]}")
        return np.load(Path(scratch, LOGITS))


def main(path: str, scratch: str, threads: int) -> None:
    """Compute logits in the child process: read tokens.npy in `scratch`, write logits.npy there."""
    llama_cpp = importlib.import_module("llama_cpp")
    tokens_BL = np.load(Path(scratch, TOKENS))
    length = tokens_BL.shape[1]
    model = llama_cpp.Llama(
        path, n_ctx=length, n_batch=length, n_threads=threads, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,  # its KV cache is float16 by default
    )  # fmt: skip
    rows = []
    for tokens_L in tokens_BL:
        model.reset()
        model.eval(tokens_L.tolist())
        rows.append(np.array(model.scores[:length]))
    np.save(Path(scratch, LOGITS), np.stack(rows))
    model.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
