"""Tasks of the EleutherAI evaluation harness, on a decoder under a policy. The extra `eval` installs it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from nestlm.data.special_tokens import SpecialTokens
from nestlm.errors import ConfigError, DataError
from nestlm.eval.task_files import check_task_files, sandboxed_templates
from nestlm.generation.generate import generate, left_padded
from nestlm.generation.sampling import GREEDY, Sampling
from nestlm.generation.text import continuation
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy
from nestlm.utils.console import track
from nestlm.utils.quiet import quiet_loggers

# The paper's; all other tasks of its table have none.
SHOTS = {"hellaswag": 10, "mmlu": 5}
BOOTSTRAPS = 1000  # samples from which the error of a metric that is no mean is estimated


@dataclass(frozen=True)
class Scored:
    """A request as tokens: what is read, whose last predictions are scored against the targets."""

    tokens: list[int]
    targets: list[int]


class HarnessModel(TemplateLM):
    """A decoder under one policy, as the harness asks models. Every text is the start of a document."""

    def __init__(
        self,
        decoder: Decoder,
        policy: Policy,
        *,
        tokenizer: Tokenizer,
        special_tokens: SpecialTokens,
        batch_size: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.decoder, self.policy, self.precision = decoder, policy, precision
        self.encoder, self.batch_size = tokenizer, batch_size
        self.special_tokens, self.max_length = special_tokens, decoder.config.context_length

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return self.special_tokens.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; the token that starts a document comes first, unless the harness refuses it."""
        del kwargs
        ids = self.encoder.encode(string, add_special_tokens=False).ids
        return ids if add_special_tokens is False else [self.special_tokens.begin, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: log-probability, and whether it is the likeliest; long contexts lose their start."""
        del kwargs
        rows = [self.fitted(context, targets) for _, context, targets in requests]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].tokens))  # rows of a batch are alike long
        found: dict[int, tuple[float, bool]] = {}
        starts = range(0, len(order), self.batch_size)
        for start in track(starts, "tasks", total=len(starts)):
            chosen = order[start : start + self.batch_size]
            found |= dict(zip(chosen, self.score([rows[row] for row in chosen]), strict=True))
        return [found[row] for row in range(len(rows))]

    def fitted(self, context: list[int], targets: list[int]) -> Scored:
        """Cut a request to the model's context. Raises DataError for a continuation that is longer."""
        if len(targets) > self.max_length:
            raise DataError(
                f"tasks: got a continuation of {len(targets)} tokens, wanted at most model.context_length="
                f"{self.max_length}; leave the task out"
            )
        return Scored([*context, *targets][-self.max_length - 1 : -1], targets)

    @torch.no_grad()
    def score(self, rows: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Score a batch of requests."""
        tokens_BL, documents_BL = left_padded([row.tokens for row in rows], device=self.decoder.embed.weight.device)
        longest = max(len(row.targets) for row in rows)
        with self.precision():
            output = self.decoder(tokens_BL, self.policy, documents_BL=documents_BL, last=longest)
        logits_BLV = output.logits_BLV.float().log_softmax(-1).cpu()
        found = []
        for row, logits_LV in zip(rows, logits_BLV, strict=True):
            targets_L = torch.tensor(row.targets)
            logits_LV = logits_LV[len(logits_LV) - len(targets_L) :]
            said = logits_LV.gather(1, targets_L[:, None]).sum()
            found.append((float(said), bool((logits_LV.argmax(-1) == targets_L).all())))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts by log-probability, in windows of the model's context that do not overlap."""
        pairs, owners = list[tuple[tuple[str, str], list[int], list[int]]](), list[int]()
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.special_tokens.begin, self.max_length, 1)
            for context, targets in map(make_disjoint_window, windows):
                pairs.append((("", ""), context, targets))
                owners.append(owner)
        totals: dict[int, float] = defaultdict(float)
        for owner, (said, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += said
        return [totals[owner] for owner in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate continuations up to the first of a task's stop strings."""
        texts = []
        for request in track(requests, "tasks", total=len(requests)):
            arguments: tuple[Any, ...] = request.args
            texts.append(self.continued(arguments[0], dict(arguments[1])))
        return texts

    def continued(self, context: str, options: dict[str, Any]) -> str:
        """Generate one continuation, up to the first of its stop strings."""
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        room = min(int(options.get("max_gen_toks", 256)), self.max_length - 1)
        drawn = bool(options.get("do_sample"))
        sampling = Sampling(temperature=options["temperature"], top_p=options.get("top_p", 1.0)) if drawn else GREEDY
        prompt, tokens, text = self.tok_encode(context)[-(self.max_length - room) :], list[int](), ""
        steps = generate(
            self.decoder,
            [prompt],
            self.policy,
            max_tokens=room,
            sampling=sampling,
            stop=self.special_tokens.stops,
            precision=self.precision,
        )
        for step in steps:
            tokens += [token for token in step if token is not None]
            text = continuation(self.encoder, prompt, tokens)
            if any(stop in text for stop in stops):
                break
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


@dataclass(frozen=True)
class Asked:
    """A task or group that is loaded, the names of its results, and examples before a question (None: its own)."""

    loaded: list[Any]
    names: list[str]
    shots: int | None


def load_tasks(names: Sequence[str], *, files: Path | None, shots: Mapping[str, int]) -> list[Asked]:
    """Load tasks, groups and tags of the harness, or those of a folder alone.

    Raises:
        ConfigError: one is not there, or runs code that a model writes.
        DataError: its data cannot be read, or a task file could run code.
    """
    if files is not None and not files.is_dir():
        raise ConfigError(f"task_files: {files} is no folder; wanted one with tasks of the harness in YAML files")
    if files is not None:
        check_task_files(files)
    with quiet_loggers("lm_eval", level=logging.WARNING):
        manager = TaskManager(include_path=files, include_defaults=files is None)
    found = []
    for name in names:
        if name not in manager.task_index:
            known = ", ".join(manager.all_tasks) if files is not None else "those that `lm-eval ls tasks` lists"
            raise ConfigError(f"tasks: got {name!r}, wanted one of {known}")
        try:
            with sandboxed_templates():
                loaded: dict[str, Any] = {**manager.load([name])}
        except (OSError, DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"tasks: cannot read the data of {name} ({reason}); without a network, take task files that name local "
                "data"
            ) from error
        if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise ConfigError(f"tasks: {name} runs programs that the model writes; leave it out")
        if name in loaded["groups"]:
            found.append(Asked([loaded["groups"][name]], [name], shots.get(name)))
        else:
            found.append(Asked(list(loaded["tasks"].values()), list(loaded["tasks"]), shots.get(name)))
    return found


def run_tasks(model: HarnessModel, tasks: Sequence[Asked], *, limit: int | None) -> dict[str, float]:
    """Run tasks and return every metric, with its standard error if any: `TASK METRIC` and `TASK METRIC stderr`.

    Args:
        model: what is asked.
        tasks: of `load_tasks`.
        limit: of the questions of each task, the first ones only; None: all.
    """
    found: dict[str, float] = {}
    for task in tasks:
        with sandboxed_templates(), quiet_loggers("lm_eval", level=logging.WARNING):
            results = simple_evaluate(
                model,
                tasks=task.loaded,
                num_fewshot=task.shots,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),
            )
        assert results is not None, "this is the only process"
        for name in task.names:
            found |= metrics_of(name, results.get("results", {})[name])
    return found


def metrics_of(task: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Rename the numbers of one task for display: the harness writes `acc,none` and `acc_stderr,none`."""
    found = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or isinstance(value, str):
            continue
        name = metric.removesuffix("_stderr") + ("" if kind == "none" else f" ({kind})")
        found[f"{task} {name}" + (" stderr" if metric.endswith("_stderr") else "")] = float(value)
    return found
