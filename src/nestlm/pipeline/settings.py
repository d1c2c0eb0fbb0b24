"""The settings of a whole run. Plug-ins bring their own classes; YAML names them by `_target_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from lightning import Trainer
from lightning.pytorch.loggers import Logger

from nestlm.cost.latency.latency import Latency
from nestlm.cost.table import Cost, PriceList
from nestlm.data.datamodule import DataSettings
from nestlm.data.special_tokens import SpecialTokens
from nestlm.data.tokenizer import load_tokenizer
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.elastic.ranking.base import Ranking
from nestlm.elastic.sampler.base import Sampler
from nestlm.errors import ConfigError
from nestlm.model.family import Family
from nestlm.router.base import Router
from nestlm.router.dynamic.base import Granularity
from nestlm.spec import Budget, SearchSpace
from nestlm.train.objective.base import Signal
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.train.optim import OptimSettings
from nestlm.train.stage_settings import ElasticSettings, JointSettings, RouterSettings, StageSettings
from nestlm.train.trainer_arguments import TrainerArguments, check_devices
from nestlm.utils.deferred import Deferred
from nestlm.utils.messages import check_folder_name

BudgetSetting = float | str | Sequence[float | str | Sequence[float | str]]


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Settings that say which text is read, and by which tokenizer."""

    model: Family
    data: DataSettings

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json to use: the one that `data.tokenizer` names, else the model's; None trains one."""
        return self.model.tokenizer_file if self.data.tokenizer is None else Path(self.data.tokenizer)

    @property
    def special_tokens(self) -> SpecialTokens | None:
        """Tokens that begin and end a text; None where the tokenizer is not there yet."""
        file = self.tokenizer_file
        return None if file is None or not file.is_file() else self.data.special.read(load_tokenizer(file), file.parent)


@dataclass(frozen=True, kw_only=True)
class SpaceSettings:
    """Settings that say which sub-networks the model has."""

    model: Family
    axes: Mapping[str, Axis]

    @property
    def axis_list(self) -> tuple[Axis, ...]:
        """The axes, in the order of the config."""
        return tuple(self.axes.values())

    def space(self) -> SearchSpace:
        """Build the search space: the choices at every site of the model."""
        return search_space(self.axis_list, self.model.decoder_config())


@dataclass(frozen=True, kw_only=True)
class PriceSettings(SpaceSettings):
    """Settings that say what the choices of a sub-network cost."""

    cost: Cost
    costs: Mapping[str, Cost]

    @property
    def latency(self) -> Latency | None:
        """The first cost that is priced from a table of times; None where the run counts no time."""
        return next(iter(self.latencies), None)

    @property
    def latencies(self) -> list[Latency]:
        """All costs that are priced from a table of times; `check` requires them to be equal."""
        return [cost for cost in (self.cost, *self.costs.values()) if isinstance(cost, Latency)]

    @property
    def is_priced(self) -> bool:
        """Whether all costs have prices now. A latency without a table gets its prices in the profile stage."""
        return self.latency is None or self.latency.table is not None

    def token_prices(self) -> PriceList:
        """Price choices that are made for each token, under the costs that can price those."""
        space, config = self.space(), self.model.decoder_config()
        tables = {}
        for name, cost in {"": self.cost, **self.costs}.items():
            if name == "" or cost.prices_tokens:  # the run's own cost says itself why it does not
                tables[name] = cost.tabulate(space, axes=self.axis_list, config=config, per_token=True)
        main = tables.pop("")
        return PriceList(main, {name: table for name, table in tables.items() if name != main.name}, per_token=True)

    def prices(self) -> PriceList:
        """Price the choices under the cost of the run, and under every other cost that a budget may limit.

        Raises:
            ConfigError: a cost stands under another name than its own.
        """
        space, config = self.space(), self.model.decoder_config()
        main = self.cost.tabulate(space, axes=self.axis_list, config=config)
        tables = {name: cost.tabulate(space, axes=self.axis_list, config=config) for name, cost in self.costs.items()}
        for name, table in tables.items():
            if table.name != name:
                raise ConfigError(
                    f"costs.{name}: prices {table.name!r}, wanted it under its own name, costs.{table.name}"
                )
        return PriceList(main, {name: table for name, table in tables.items() if name != main.name})


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(PriceSettings):
    """Settings that say what the router is, and what trains it."""

    router: RouterSettings
    data: DataSettings

    def make_router(self) -> Router:
        """Build an untrained router on the prices of its choices.

        Raises:
            ConfigError: the prompt of a per-prompt router is as long as a row.
        """
        if not self.router.per_token:
            return self.router.network(prices=self.prices())
        horizon = self.data.sequence_length
        prompt_tokens = self.router.prompt_tokens if self.router.granularity == "prompt" else 0
        if prompt_tokens >= horizon:
            raise ConfigError(
                f"router.prompt_tokens: got {prompt_tokens}, wanted fewer than data.sequence_length={horizon}"
            )
        return self.router.network(
            prices=self.token_prices(),
            hidden_size=self.model.decoder_config().hidden_size,
            granularity=Granularity(prompt_tokens, horizon),
        )

    def make_signal(self, router: Router) -> Signal | None:
        """Build the objective that trains a router; None where the router learns nothing."""
        return None if self.router.signal is None else self.router.signal(router)


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings, RoutingSettings):
    """Settings of a whole run. Every field is a config group or a plain value of `conf/train.yaml`.

    Attributes:
        label: name of the run in tables over several runs; None where its settings tell it from others.
        plugins: packages of the user whose classes the config may name.
    """

    ranking: Ranking
    teacher: DistillationLoss
    sampler: Sampler
    optim: OptimSettings
    trainer: Annotated[Callable[..., Trainer], Deferred(takes=TrainerArguments)]
    logger: Annotated[Callable[..., Logger], Deferred(("save_dir", "name"))]
    pretrain: StageSettings
    elastic: ElasticSettings
    joint: JointSettings
    budget: BudgetSetting
    experiment_name: str
    label: str | None
    plugins: Sequence[str]
    seed: int
    run_dir: str | None
    cache_dir: str | None
    cache: Literal["on", "off"]
    checkpoint_seconds: float
    activation_checkpointing: bool
    elastic_probe_steps: int
    dry_run: bool
    traceback: bool

    def __post_init__(self) -> None:
        check_folder_name(self.experiment_name, "experiment_name", parts=8)
        for name in ("run_dir", "cache_dir"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}: got an empty text, wanted a folder, or null")
        check_devices(getattr(self.trainer, "keywords", {}))

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets of `budget=`: shares first, the largest first."""
        return Budget.parse_all(self.budget)

    def with_latency(self, latency: Latency) -> Settings:
        """Return settings in which `latency` replaces every cost that counts time."""

        def swap(cost: Cost) -> Cost:
            return latency if isinstance(cost, Latency) else cost

        return replace(self, cost=swap(self.cost), costs={name: swap(cost) for name, cost in self.costs.items()})

    def with_skippable(self, layers: Sequence[int]) -> Settings:
        """Return settings whose block axes may skip the blocks in `layers`, and no others."""
        return replace(self, axes={name: axis.at_layers(layers) for name, axis in self.axes.items()})
