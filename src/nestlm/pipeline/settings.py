"""The settings of a whole run. Plug-ins bring their own classes; YAML names them by `_target_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

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
from nestlm.train.objective.elastic_values import ElasticValues, draws_per_token
from nestlm.train.optim import OptimSettings
from nestlm.train.settings import ElasticSettings, JointSettings, RouterSettings, StageSettings
from nestlm.train.trainer_arguments import TrainerArguments, check_devices
from nestlm.utils.deferred import Deferred
from nestlm.utils.messages import check_folder_name


@dataclass(frozen=True)
class Settings:
    """A whole run. Every field is a config group or a plain value of `conf/train.yaml`.

    Attributes:
        label: what tables over several runs call this one; None where its settings tell it from others.
        plugins: packages of the user's own whose classes the config may name.
    """

    model: Family
    axes: Mapping[str, Axis]
    ranking: Ranking
    teacher: DistillationLoss
    sampler: Sampler
    cost: Cost
    costs: Mapping[str, Cost]
    router: RouterSettings
    data: DataSettings
    optim: OptimSettings
    trainer: Annotated[Callable[..., Trainer], Deferred(takes=TrainerArguments)]
    logger: Annotated[Callable[..., Logger], Deferred(("save_dir", "name"))]
    pretrain: StageSettings
    elastic: ElasticSettings
    joint: JointSettings
    budget: float | str | Sequence[float | str | Sequence[float | str]]
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
    def axis_list(self) -> tuple[Axis, ...]:
        """The axes, in the order of the config."""
        return tuple(self.axes.values())

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets asked for: shares first, the largest first."""
        return Budget.parse_all(self.budget)

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer to use: the one that was named, or the model's; None trains one."""
        return self.model.tokenizer_file if self.data.tokenizer is None else Path(self.data.tokenizer)

    @property
    def special_tokens(self) -> SpecialTokens | None:
        """The tokens around a text; None where the tokenizer is not there yet."""
        file = self.tokenizer_file
        return None if file is None or not file.is_file() else self.data.special.read(load_tokenizer(file), file.parent)

    @property
    def latency(self) -> Latency | None:
        """The cost that is priced from a table of times, where the run counts one."""
        return next(iter(self.latencies), None)

    @property
    def latencies(self) -> list[Latency]:
        """Every place where time is counted; `check` holds them equal."""
        return [cost for cost in (self.cost, *self.costs.values()) if isinstance(cost, Latency)]

    @property
    def is_priced(self) -> bool:
        """Whether all costs have prices now; otherwise they wait for the profile stage."""
        return self.latency is None or self.latency.table is not None

    def with_latency(self, latency: Latency) -> Settings:
        """The same settings with another cost wherever time is counted."""

        def swap(cost: Cost) -> Cost:
            return latency if isinstance(cost, Latency) else cost

        return replace(self, cost=swap(self.cost), costs={name: swap(cost) for name, cost in self.costs.items()})

    def with_skippable(self, layers: Sequence[int]) -> Settings:
        """The same settings with the blocks that the ranking lets be skipped."""
        return replace(self, axes={name: axis.at_layers(layers) for name, axis in self.axes.items()})

    def space(self) -> SearchSpace:
        """The choices of the model."""
        return search_space(self.axis_list, self.model.decoder_config())

    def make_router(self) -> Router:
        """A new router, on the prices of what it chooses."""
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

    def make_elastic_values(self) -> ElasticValues | None:
        """What learns the values of choices along with the model; None where tokens do not draw their own."""
        settings = self.elastic.values
        drawn = self.sampler.draw(self.space(), seed=self.seed, step=0, batch=(1, 1))
        if settings is None or not any(draws_per_token(each) for each in drawn):
            return None
        return ElasticValues(
            self.space(),
            hidden_size=self.model.decoder_config().hidden_size,
            hidden_width=settings.hidden_width,
            seed=self.seed,
        )

    def make_signal(self, router: Router) -> Signal | None:
        """What trains the router; None where nothing is learned."""
        return None if self.router.signal is None else self.router.signal(router)

    def token_prices(self) -> PriceList:
        """The prices of choices that are made for each token, of the kinds that depend on them."""
        space, config = self.space(), self.model.decoder_config()
        tables = {}
        for name, cost in {"": self.cost, **self.costs}.items():
            if name == "" or cost.prices_tokens:  # the run's own cost says itself why it does not
                tables[name] = cost.tabulate(space, axes=self.axis_list, config=config, per_token=True)
        main = tables.pop("")
        return PriceList(main, {name: table for name, table in tables.items() if name != main.name}, per_token=True)

    def prices(self) -> PriceList:
        """The prices of the choices: by the run's own cost, and by every other kind that a budget may limit."""
        space, config = self.space(), self.model.decoder_config()
        main = self.cost.tabulate(space, axes=self.axis_list, config=config)
        tables = {name: cost.tabulate(space, axes=self.axis_list, config=config) for name, cost in self.costs.items()}
        for name, table in tables.items():
            if table.name != name:
                raise ConfigError(
                    f"costs.{name}: prices {table.name!r}, wanted it under its own name, costs.{table.name}"
                )
        return PriceList(main, {name: table for name, table in tables.items() if name != main.name})


# What follows from which fields, and what a stage may see although it changes no number.
DERIVED = {
    "axis_list": {"axes"},
    "budgets": {"budget"},
    "latency": {"cost", "costs"},
    "space": {"axes", "model"},
    "tokenizer_file": {"data", "model"},
    "prices": {"axes", "model", "cost", "costs"},
    "make_router": {"axes", "model", "cost", "costs", "router", "data"},
    "make_elastic_values": {"axes", "model", "elastic", "sampler", "seed"},
    "make_signal": {"axes", "model", "cost", "costs", "router", "data"},
}
HARMLESS = {"checkpoint_seconds", "activation_checkpointing", "elastic_probe_steps"}


class View:
    """The settings that a stage declared that it reads, and what follows from them.

    Anything else is out of reach, so that no cached result depends on a value that its key does not cover.
    """

    def __init__(self, settings: Settings, reads: tuple[str, ...]) -> None:
        derived = {name for name, sources in DERIVED.items() if sources <= set(reads)}
        self._settings, self._allowed = settings, {*reads, *derived, *HARMLESS}

    def __getattr__(self, name: str) -> Any:
        if name not in self._allowed:
            raise AttributeError(f"the stage does not declare that it reads {name!r}; it reads {sorted(self._allowed)}")
        return getattr(self._settings, name)
