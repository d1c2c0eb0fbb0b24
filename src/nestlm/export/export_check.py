"""Check that an export computes what the nested model computes, by reloading it with the library that it is for."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from nestlm.data.tokenizer import make_text_encoder
from nestlm.errors import ExportError
from nestlm.export import gguf_file, hf_folder, llama_cpp_process
from nestlm.model.family import Family
from nestlm.nn.decoder import Decoder
from nestlm.utils.quiet import TORCHAO_LOGGERS, quiet_loggers

REASON = 100  # characters that are shown of another library's error message
LIMITS = {"hf": 1e-4, "gguf": 1e-3}  # largest allowed difference of logits in float32, by format
WARM_UP, REPEATS = 1, 5  # forward passes before timing, and forward passes that are timed

LogitsFn = Callable[[Tensor], Tensor]  # tokens (1, L) to logits (1, L, V)


@dataclass(frozen=True)
class ExportReference:
    """The nested model and the text that an export is compared with.

    Attributes:
        wanted: computes the logits of the nested model at the exported budget.
        decoder: the whole model.
        family: the family and sizes of the whole model.
        text_BL: token ids of real text.
        limit: largest allowed difference of logits; None: the difference is reported, not limited.
    """

    wanted: LogitsFn
    decoder: Decoder
    family: Family
    text_BL: Tensor
    limit: float | None

    def whole(self, tokens_BL: Tensor) -> Tensor:
        """Compute the logits (B, L, V) of the whole model."""
        return self.decoder(tokens_BL).logits_BLV


@dataclass(frozen=True)
class ExportCheck:
    """Measurements from the comparison of an export with the nested model.

    Attributes:
        library: name and version of the library that opened the export.
        difference: largest absolute difference of logits.
        deviation: standard deviation of the wanted logits, the scale on which to read `difference`.
        tokens: number of tokens on which logits were compared.
        loss: loss of the export on that text, nats per token.
        full_loss: loss of the whole model on that text, nats per token.
        parameters: number of parameters of the export.
        full_parameters: number of parameters of the whole model.
        size: bytes of the export on disk.
        seconds: time of a forward pass of the export over one row of the text.
        full_seconds: time of the same forward pass of the whole model, in the same library.
        timed_in: name of the library in which both were timed.
        notes: sentences on what was not checked, or differs.
    """

    library: str
    difference: float
    deviation: float
    tokens: int
    loss: float
    full_loss: float
    parameters: int
    full_parameters: int
    size: int
    seconds: float
    full_seconds: float
    timed_in: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Format the check as lines to print."""
        return [
            f"largest difference of logits {self.difference:.1e} in {self.library} "
            f"({self.tokens:,} tokens of text; their deviation is {self.deviation:.2f})",
            f"loss {self.loss:.4f} on that text, {self.full_loss:.4f} the whole model",
            f"{self.parameters:,} parameters of {self.full_parameters:,}, {self.size / 1e6:,.1f} MB on disk",
            f"{self.seconds * 1e3:.1f} ms a forward pass in {self.timed_in}, {self.full_seconds * 1e3:.1f} ms "
            f"the whole model ({self.seconds / self.full_seconds:.2f})",
            *self.notes,
        ]


def check_library(form: str) -> None:
    """Raise ExportError if the library that the check of a format (hf or gguf) needs is not installed."""
    if form == "hf" and importlib.util.find_spec("transformers") is None:
        raise ExportError("export: --format hf is checked with transformers; pip install 'nestlm[hf]'")


def check_hf_folder(folder: Path, reference: ExportReference, *, runs_code: bool, tokenizer: Tokenizer) -> ExportCheck:
    """Load a Hugging Face folder with transformers and compare its logits with the nested model's.

    Args:
        folder: the export; `hf_folder.check_code` must have passed.
        reference: the model and text to compare with.
        runs_code: whether the folder holds a modelling file, which transformers runs with `trust_remote_code`.
        tokenizer: the run's tokenizer.

    Raises:
        ExportError: the logits differ by more than the limit, or are not finite.
    """
    import transformers

    with quiet_transformers(transformers):
        opening = {"trust_remote_code": runs_code, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **opening).eval()
        whole = whole_model_in_transformers(reference, dtype=model.dtype)
        notes = tokenizer_notes(folder, reference.text_BL, tokenizer=tokenizer, opening=opening)

    def run(tokens_BL: Tensor) -> Tensor:
        return model(tokens_BL).logits.float()

    library = f"transformers {transformers.__version__}"
    return compare_logits(
        run,
        reference,
        library=library,
        timed={library: (run, lambda tokens_BL: whole(tokens_BL).logits)},
        parameters=sum(each.numel() for each in model.parameters()),
        folder=folder,
        notes=notes,
    )


def tokenizer_notes(folder: Path, text_BL: Tensor, *, tokenizer: Tokenizer, opening: dict[str, Any]) -> tuple[str, ...]:
    """Describe how an export's tokenizer, opened by transformers, differs from the tokenizer of training.

    Args:
        folder: the export.
        text_BL: token ids of real text, on which the tokenizers are compared.
        tokenizer: the run's tokenizer.
        opening: options of transformers' `from_pretrained`.

    Returns:
        One sentence where transformers fails to open it or splits the text into other tokens; else nothing.
    """
    import transformers

    plain = make_text_encoder(tokenizer)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, **opening)
    except Exception as error:  # noqa: BLE001 (tokenizers raises bare exceptions, and classes of transformers raise any)
        reason = " ".join(str(error).split())[:REASON]
        return (f"transformers cannot open the tokenizer, which is the parent's ({type(error).__name__}: {reason})",)
    for tokens_L in text_BL.tolist():
        text = plain.decode(tokens_L)
        if theirs(text, add_special_tokens=False).input_ids != plain.encode(text, add_special_tokens=False).ids:
            return ("transformers opens the tokenizer as it opens the parent's, but tokens differ from tokenizer.json",)
    return ()


def check_gguf_file(path: Path, reference: ExportReference, *, small: Decoder) -> ExportCheck:
    """Compare the logits of a GGUF file with the nested model's.

    The file is read back with the gguf package, and also run in llama.cpp if llama-cpp-python is installed.

    Args:
        path: the file.
        reference: the model and text to compare with.
        small: the sub-network that was written.

    Raises:
        ExportError: the logits differ by more than the limit or are not finite, or llama.cpp cannot run the file.
    """
    back = gguf_file.read_gguf(path, reference.family)
    known: dict[str, Any] = {
        "timed": {"nestlm": (lambda tokens_BL: small(tokens_BL).logits_BLV, reference.whole)},
        "parameters": sum(each.numel() for each in small.parameters()),
        "folder": path.parent,
    }
    name = llama_cpp_process.llama_cpp_version()
    missing = "llama.cpp did not run it, since llama-cpp-python is not installed; its tensors and sizes were read back"
    check = compare_logits(
        lambda tokens_BL: back(tokens_BL).logits_BLV,
        reference,
        library="nestlm, from what the gguf package reads",
        notes=() if name else (missing,),
        **known,
    )
    if name is None:
        return check
    try:
        logits_BLV = llama_cpp_process.llama_cpp_logits(
            path, reference.text_BL.numpy(), threads=torch.get_num_threads()
        )
    except ChildProcessError as error:
        raise ExportError(
            f"export: {name} cannot run the file ({error}); uninstall llama-cpp-python to do without this check"
        ) from error
    rows = iter(torch.from_numpy(logits_BLV).split(1))
    return compare_logits(lambda tokens_BL: next(rows), reference, library=name, **known)


@torch.no_grad()
def compare_logits(
    run: LogitsFn,
    reference: ExportReference,
    *,
    library: str,
    timed: dict[str, tuple[LogitsFn, LogitsFn]],
    parameters: int,
    folder: Path,
    notes: tuple[str, ...] = (),
) -> ExportCheck:
    """Compare an export's logits with the nested model's, one row of text at a time, and time both.

    A dynamic router decides the same in a batch of one as in a larger batch, so rows can be compared one by one.

    Args:
        run: computes the export's logits.
        reference: the model and text to compare with.
        library: name of the library that opened the export.
        timed: one entry: name of a library, and two functions to time there, the export and the whole model.
        parameters: number of parameters of the export.
        folder: the export on disk, whose files are added up.
        notes: see `ExportCheck`.

    Raises:
        ExportError: the logits differ by more than the limit, or are not finite.
    """
    differences, logits, losses, full_losses = [], [], [], []
    for tokens_1L in reference.text_BL.split(1):
        got, wanted = run(tokens_1L).float(), reference.wanted(tokens_1L).float()
        differences.append((got - wanted).abs().max())
        logits.append(wanted.std())
        losses.append(next_token_loss(got, tokens_1L))
        full_losses.append(next_token_loss(reference.whole(tokens_1L), tokens_1L))
    difference = float(torch.stack(differences).max())
    limit = torch.inf if reference.limit is None else reference.limit
    if not math.isfinite(difference):
        raise not_finite(logits, library=library)
    if not difference <= limit:
        raise ExportError(
            f"export: logits in {library} differ by {difference:.1e}, wanted at most {limit:.0e}; "
            "nothing is left of it; please report this with the run's config.yaml"
        )
    ((timed_in, runs),) = timed.items()
    seconds, full_seconds = time_forward(runs, reference.text_BL[:1])
    return ExportCheck(
        library=library,
        difference=difference,
        deviation=float(torch.stack(logits).mean()),
        tokens=reference.text_BL.numel(),
        loss=float(torch.stack(losses).mean()),
        full_loss=float(torch.stack(full_losses).mean()),
        parameters=parameters,
        full_parameters=sum(each.numel() for each in reference.decoder.parameters()),
        size=sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()),
        seconds=seconds,
        full_seconds=full_seconds,
        timed_in=timed_in,
        notes=notes,
    )


def not_finite(deviations: list[Tensor], *, library: str) -> ExportError:
    """Return the error for logits that are not finite; its message blames the nested model or the export's dtype.

    Args:
        deviations: standard deviations of the nested model's logits, one per row; not finite if those logits are not.
        library: name of the library that opened the export.
    """
    if not torch.stack(deviations).isfinite().all():
        return ExportError("export: the nested model's own logits are not finite; train it again, with a lower lr")
    return ExportError(
        f"export: logits in {library} are not finite: numbers leave the range of its dtype while it computes; "
        "nothing is left of it; wanted a dtype of larger range: --dtype bf16 or f32"
    )


def next_token_loss(logits_1LV: Tensor, tokens_1L: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of each next token of one row, in nats."""
    return F.cross_entropy(logits_1LV[0, :-1].float(), tokens_1L[0, 1:])


def time_forward(runs: tuple[LogitsFn, LogitsFn], tokens_1L: Tensor) -> tuple[float, float]:
    """Measure the median seconds of a forward pass of two models on one row of tokens; the models take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(WARM_UP + REPEATS):
        for run, found in zip(runs, times, strict=True):
            started = time.perf_counter()
            run(tokens_1L)
            if repeat >= WARM_UP:
                found.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def whole_model_in_transformers(reference: ExportReference, *, dtype: torch.dtype) -> Any:
    """Build the whole model as a transformers model in `dtype`, without copies of weights that have this dtype."""
    import transformers

    sizes = reference.family.make_hf_config()
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = hf_folder.hf_state_dict(reference.decoder, reference.family, dtype=dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@contextmanager
def quiet_transformers(transformers: Any) -> Iterator[None]:
    """Keep progress bars and warnings of transformers, and of torchao, which it imports, off the terminal."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_loggers(*TORCHAO_LOGGERS):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
