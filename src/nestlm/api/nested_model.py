"""A finished run as one nested model: name a budget, and generate, evaluate or export at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from tokenizers import Tokenizer

from nestlm.api.export_run import LoadedRun, Request, export
from nestlm.api.one_device import on_device
from nestlm.api.reproduce import own_table
from nestlm.cost.table import PriceList
from nestlm.data import tokenizer as tokenizers
from nestlm.data.datamodule import DataSettings
from nestlm.data.manifest import TOKENIZER
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.auto import source_from_path
from nestlm.data.special_tokens import SpecialTokens, SpecialTokenWarner
from nestlm.elastic.axes.base import Axis
from nestlm.errors import CheckpointError, ConfigError
from nestlm.eval.heldout import HeldOut, RunTasks, held_out, task_runner
from nestlm.eval.policy_scores import evaluate
from nestlm.export.export_check import ExportCheck
from nestlm.generation.generate import generate
from nestlm.generation.rows import batch_policy
from nestlm.generation.sampling import GREEDY, Sampling
from nestlm.generation.text import continuation
from nestlm.model.family import Family
from nestlm.model.weights_io import CURE
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import fixed
from nestlm.pipeline.runtime import StageRuntime
from nestlm.pipeline.settings import Settings
from nestlm.pipeline.stages.evaluate import EvaluateStage
from nestlm.pipeline.stages.rank import RankStage
from nestlm.report.run_folder import read_result
from nestlm.report.runs import read_provenance
from nestlm.router.at_budget import AtBudget, recall
from nestlm.router.base import RoutedPolicy, Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.protocols import PlanningRouter, narrow
from nestlm.router.static.knapsack import KnapsackRouter
from nestlm.router.static.uniform import best_uniform
from nestlm.spec import Budget
from nestlm.train.trainer import make_trainer
from nestlm.utils.console import track
from nestlm.utils.json_files import read_json

POLICIES = ("static", "dynamic")


class NestedModel:
    """A finished run: one set of weights, and a router that finds a sub-network for any budget.

    Attributes:
        folder: folder of the run.
        settings: settings of the run, with the device that was asked for.
        decoder: the decoder after the last stage, on that device.
        router: the router that the run trained.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        checkpoints = folder / "checkpoints"
        inputs = {path.name: path for path in checkpoints.iterdir()} if checkpoints.is_dir() else {}
        for stage in ("data", "joint"):
            if stage not in inputs:
                raise CheckpointError(f"{checkpoints / stage} does not exist; {CURE}")
        self.stage = EvaluateStage.of(settings)
        self.runtime = StageRuntime.of(settings, folder=folder, inputs=inputs, logger=DummyLogger())
        self.decoder: Decoder = self.stage.load_decoder(self.runtime, "joint").to(self.device).eval()
        self.router: Router = self.stage.load_router(self.runtime).to(self.device).eval()
        self.known: dict[tuple[Budget, str], AtBudget] = {}

    @classmethod
    def open(cls, folder: Path, settings: Settings, *, device: str | None) -> NestedModel:
        """Open the nested model of a finished run.

        Args:
            folder: folder of the finished run.
            settings: its settings, as built from the config that the run stored.
            device: a device name of torch, such as `cuda:0`; None: the device of the run's trainer.

        Raises:
            NestlmError: something is missing or damaged, or the device is not there.
        """
        settings = own_table(settings, folder)
        settings = RankStage.of(settings).refine(settings, read_result(folder, RankStage), folder=folder)
        return cls(folder, on_device(settings, device))

    @property
    def device(self) -> torch.device:
        """Device on which the model computes."""
        return self.stage.device()

    @property
    def family(self) -> Family:
        """The model family and its sizes."""
        return self.settings.model

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The elasticity axes, in the order of the config."""
        return self.settings.axis_list

    @property
    def tokenizer_folder(self) -> Path:
        """The folder that holds tokenizer.json."""
        return self.runtime.inputs["data"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that encodes prompts and texts."""
        return tokenizers.make_text_encoder(tokenizers.load_tokenizer(self.tokenizer_folder / TOKENIZER))

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Ids of the tokens that begin and end a text."""
        return PreparedData.read(self.tokenizer_folder).special_tokens

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Content of metrics.json: what the run's stages measured, by stage."""
        return read_json(self.folder / "metrics.json", cure=CURE)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Content of provenance.json; `data_fingerprint` identifies the text."""
        return read_provenance(self.folder)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Budgets that the run was made for."""
        return self.settings.budgets

    @cached_property
    def prices(self) -> PriceList:
        """Prices of sub-networks, under every cost that a budget may limit."""
        return self.settings.prices()

    @cached_property
    def calibration(self) -> CalibrationData:
        """Calibration text on which the run's router was prepared."""
        return self.stage.calibration_data(self.decoder, self.runtime, num_sequences=self.settings.router.num_sequences)

    def at(self, budget: Any, *, router: str | None = None) -> AtBudget:
        """Find the sub-network, or the per-token policy, for a budget.

        For one of the run's budgets the stored result is returned; for others the router searches now.

        Args:
            budget: as in `budget=`: 0.6, "60%", "8GiB", or a list of limits that hold together.
            router: `static` or `dynamic`; None: the run's own. A dynamic run's static router is an exact knapsack on
                what its router has measured.

        Raises:
            BudgetError: the value is not a budget, or no sub-network meets it.
            ConfigError: the run has no such router.
        """
        asked = budget if isinstance(budget, Budget) else Budget.parse(budget)
        policy = self.settings.router.policy if router is None else router
        if (asked, policy) not in self.known:
            self.known[asked, policy] = self.find(asked, policy=policy)
        return self.known[asked, policy]

    def generate(self, prompt: str, *, budget: Any = 1.0, **options: Any) -> str:
        """Continue a prompt until its document ends, or up to `max_tokens`; see `generate_batch` for the options."""
        return self.generate_batch([prompt], budgets=[budget], **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        budgets: Sequence[Any],
        router: str | None = None,
        max_tokens: int = 64,
        sampling: Sampling = GREEDY,
        special_tokens: bool = False,
    ) -> list[str]:
        """Continue prompts in one batch, each at its own budget. No continuation depends on the other prompts.

        Args:
            prompts: texts; each is the start of a document.
            budgets: one for each prompt, as in `at`.
            router: as in `at`.
            max_tokens: largest number of tokens of each continuation.
            sampling: how tokens are chosen; by default greedily.
            special_tokens: whether the name of a special token in a prompt becomes that token, and not plain text.

        Raises:
            BudgetError, ConfigError: as `at` does.
            DataError: a prompt does not fit into the context, or holds text that the tokenizer cannot encode.
        """
        encoded = [self.encode(prompt, special_tokens=special_tokens) for prompt in prompts]
        found = [self.at(budget, router=router) for budget in budgets]
        steps = list(self.tokens(encoded, found, max_tokens=max_tokens, sampling=sampling))
        rows = [[token for step in steps if (token := step[row]) is not None] for row in range(len(encoded))]
        return [continuation(self.tokenizer, prompt, row) for prompt, row in zip(encoded, rows, strict=True)]

    def encode(self, prompt: str, *, special_tokens: bool = False) -> list[int]:
        """Encode a prompt as token ids, after the token that begins a document.

        Args:
            prompt: the text.
            special_tokens: as `generate_batch` takes it.

        Raises:
            DataError: the tokenizer cannot encode the prompt, or gives an id outside the vocabulary of the model.
        """
        encoder = (
            tokenizers.make_text_encoder(self.tokenizer, special_tokens=True) if special_tokens else self.tokenizer
        )
        cure = "special_tokens=True (--special-tokens)"
        SpecialTokenWarner(encoder, where="prompt: holds", cure=cure).check(prompt)
        ids = tokenizers.encode_prompt(encoder, prompt, begin=self.special_tokens.begin)
        tokenizers.check_token_ids(encoder, ids, vocab_size=self.decoder.config.vocab_size, where="prompt:")
        return ids

    def tokens(
        self, prompts: Sequence[Sequence[int]], found: Sequence[AtBudget], *, max_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        """Yield, at each step, the next token of each prompt; None for a prompt whose continuation has ended.

        Args:
            prompts: token ids of each prompt.
            found: the policy of each prompt, as `at` returns it.
            max_tokens: largest number of steps.
            sampling: how tokens are chosen.
        """
        if len(prompts) != len(found):
            raise ConfigError(f"budgets: got {len(found)} for {len(prompts)} prompts, wanted one a prompt")
        policy = batch_policy([each.routed for each in found], space=self.prices.space, device=self.device)
        return generate(
            self.decoder,
            prompts,
            policy,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=self.special_tokens.stops,
            precision=make_trainer(self.settings.trainer).precision_plugin.forward_context,
        )

    def evaluate(
        self,
        budgets: Sequence[Any] | None = None,
        *,
        router: str | None = None,
        data: DataSettings | str | None = None,
        tasks: Sequence[str] = (),
        task_files: str | Path | None = None,
        shots: Mapping[str, int] | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Score budgets on held-out text and on tasks of the EleutherAI harness; return one row for each budget.

        Args:
            budgets: as in `at`; None: those of the run.
            router: as in `at`.
            data: the text: settings of the data group, or a path as for `data.path=`. The validation split is scored
                of a prepared folder, and of text with a `heldout_share`; all of it of other text. None: the run's
                own validation split.
            tasks: names of tasks of the harness.
            task_files: a folder of task files; tasks are then looked up there only.
            shots: number of few-shot examples, by task; by default the paper's number, else the task's own.
            limit: number of questions of each task, from the first one; None: all.
            batch_size: batch size of the tasks; None: `data.eval_batch_size`.

        Raises:
            NestlmError: a budget, a text or a task cannot be used.
        """
        found = [self.at(budget, router=router) for budget in (self.budgets if budgets is None else budgets)]
        run = None
        if tasks:
            run = task_runner(
                self.decoder,
                tasks,
                tokenizer=self.tokenizer,
                special_tokens=self.special_tokens,
                precision=make_trainer(self.settings.trainer).precision_plugin.forward_context,
                files=None if task_files is None else Path(task_files),
                shots=shots or {},
                limit=limit,
                batch_size=self.settings.data.eval_batch_size if batch_size is None else batch_size,
            )
        if isinstance(data, str):
            data = replace(self.settings.data, source=source_from_path(data), path=data, heldout_share=None)
        own = self.stage.packed_tokens(self.runtime, stream="validation")
        with held_out(data, config=self.decoder.config, seed=self.settings.seed, own=own) as text:
            rows = [self.row(each, text, run) for each in track(found, "evaluate", total=len(found))]
        return rows

    def row(self, found: AtBudget, text: HeldOut, run: RunTasks | None) -> dict[str, Any]:
        """Score the policy found for a budget; return one row of results.csv, by column name.

        Args:
            found: the policy, as `at` returns it.
            text: held-out text for loss, perplexity, bits per byte and accuracy.
            run: scores a policy on the tasks of the harness; None: no tasks.
        """
        trainer = make_trainer(self.settings.trainer)
        scores = evaluate(self.decoder, found.policy, loader=text.loader, trainer=trainer, prices=found.prices)
        spent = scores.spending[self.prices.main.name].mean
        return {
            "router": found.router,
            "budget": str(found.budget),
            "achieved": spent if found.spec is None else self.prices.main.share(found.spec),
            "val_loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte(tokens=text.split.tokens, num_bytes=text.split.bytes),
            "accuracy": scores.accuracy,
            **({} if run is None else run(found.policy)),
        }

    def find(self, budget: Budget, *, policy: str) -> AtBudget:
        """Find the sub-network, or the per-token policy, for a budget; `at` caches what this returns.

        Args:
            budget: the parsed budget.
            policy: `static` or `dynamic`. A budget of the run under its own policy is read from `specs/`.
        """
        label, router = self.router_of(policy)
        kept = self.folder / "specs" / f"{budget}.json"
        if router is self.router and kept.is_file():
            return recall(kept, budget, router=router, prices=self.prices)
        router.check(budget)
        routed = router.find(budget, calibration=self.calibration if router.needs_calibration else None)
        achieved = None if routed.spec is None else self.prices.main.share(routed.spec)
        return AtBudget(budget, label, routed, achieved, router.prices)

    def router_of(self, policy: str) -> tuple[str, Router]:
        """Return the label in results.csv, and the router, for `static` or `dynamic`.

        Raises:
            ConfigError: the run has no such router.
        """
        own = self.settings.router
        if policy == own.policy:
            return own.label, self.router
        if policy == "static" and self.router.per_token:
            static = KnapsackRouter(prices=self.prices)
            static.sensitivities.copy_(narrow(self.router, PlanningRouter).measured)
            return "knapsack", static
        if policy not in POLICIES:
            raise ConfigError(f"router: got {policy!r}, wanted {' or '.join(POLICIES)}")
        raise ConfigError(
            f"router: got {policy}, but the run's router is {own.label}; train one with router=value "
            "router.policy=dynamic"
        )

    def uniform(self, budget: Any) -> AtBudget:
        """Find the best sub-network that has the same widths in all layers.

        Takes a budget as `at` does. Raises BudgetError where no such sub-network keeps it.
        """
        asked = budget if isinstance(budget, Budget) else Budget.parse(budget)
        spec = best_uniform(self.prices, asked, calibration=lambda: self.calibration)
        return AtBudget(asked, "uniform", RoutedPolicy(fixed(spec), spec), self.prices.main.share(spec), self.prices)

    def export(
        self,
        out: Path | str,
        *,
        budget: Any,
        form: str = "hf",
        uniform: bool = False,
        router: str | None = None,
        precision: str | None = None,
        push_to: str | None = None,
    ) -> ExportCheck:
        """Write the sub-network, or routed model, of a budget as a stand-alone model, and compare the outputs.

        All computation is on the CPU.

        Args:
            out: a folder that does not exist yet, or is empty; it appears whole or not at all.
            budget: as `at` takes it.
            form: `hf` for transformers, `gguf` for llama.cpp.
            uniform: export what `uniform` finds, instead of what the router finds.
            router: as `at` takes it.
            precision: `f32`, `f16`, `bf16`, or for GGUF `q8_0`; None: the dtype of the parent's weights.
            push_to: OWNER/NAME on the Hugging Face hub, to upload the folder to; None: no upload.

        Raises:
            NestlmError: the budget cannot be met, or nothing is written: see `exporting.export`.
        """
        request = Request(Path(out), form, precision, push_to)
        request.check(self.family, run=self.folder)
        if uniform and router == "dynamic":
            raise ConfigError("export: got uniform and router=dynamic, wanted one of them")
        model = self if self.device.type == "cpu" else NestedModel.open(self.folder, self.settings, device="cpu")
        found = model.uniform(budget) if uniform else model.at(budget, router=router)
        run = LoadedRun(model.stage, model.runtime, model.decoder, model.router, model.prices, model.provenance)
        return export(run, found.routed, request, budget=found.budget, router=found.router, achieved=found.achieved)
