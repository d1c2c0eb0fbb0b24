"""What a run is told: the top-level settings. Plug-ins bring their own classes; YAML names them by `_target_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from nestlm.cost.latency.latency import Latency
from nestlm.cost.table import Cost, PriceList
from nestlm.data.datamodule import DataSettings
from nestlm.data.special_tokens import SpecialTokens
from nestlm.data.tokenizer import check_vocabulary, load_tokenizer
from nestlm.elastic.axes.base import Axis, search_space
from nestlm.elastic.axes.depth import Depth
from nestlm.elastic.ranking.base import Ranking
from nestlm.elastic.sampler.base import Sampler
from nestlm.errors import ConfigError
from nestlm.model.family import Family
from nestlm.router.base import Router
from nestlm.router.dynamic.base import Granularity
from nestlm.spec import Budget, SearchSpace
from nestlm.train.objective.base import Signal
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.train.objective.elastic_values import ElasticValues, ValueSettings, by_token
from nestlm.train.optim import OptimSettings
from nestlm.train.trainer_arguments import TrainerArguments, check_devices
from nestlm.utils.deferred import Deferred
from nestlm.utils.messages import check_name


@dataclass(frozen=True)
class StageSettings:
    """Length and peak learning rate of a training stage."""

    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps: got {self.steps}, wanted 0 (leave the stage out) or more")
        if self.lr <= 0:
            raise ConfigError(f"lr: got {self.lr}, wanted a positive learning rate")


@dataclass(frozen=True)
class ElasticSettings(StageSettings):
    """Elastic training.

    Attributes:
        values: networks that learn what choices cost tokens along with the model; None leaves them out.
    """

    values: ValueSettings | None


@dataclass(frozen=True)
class JointSettings(StageSettings):
    """Joint tuning of model and router.

    Attributes:
        budgets_per_step: routed sub-networks that a step trains beside the full model.
        cost_weight: lambda of the routers' distance from the budget.
        dead_zone: relative distance that costs nothing.
    """

    budgets_per_step: int
    cost_weight: float
    dead_zone: float


@dataclass(frozen=True)
class RouterSettings:
    """The router group.

    Attributes:
        name: as in `router=NAME`.
        policy: `static`, or `dynamic` where the network sees hidden states and tokens differ.
        granularity: of a dynamic policy: a decision for each `token`, or for each `prompt`, whose first `prompt_tokens`
            run whole.
        prompt_tokens: P.
        network: makes the router from a price list.
        signal: makes the objective that trains it; None where nothing is learned.
        num_sequences: calibration sequences on which the router tries candidates or meets budgets.
        steps: training steps of the router stage.
        lr: peak learning rate of the router, in its own stage.
        joint_lr: the same in joint tuning.
    """

    name: str
    policy: Literal["static", "dynamic"]
    granularity: Literal["token", "prompt"]
    prompt_tokens: int
    network: Annotated[Callable[..., Router], Deferred(("prices", "hidden_size", "granularity"))]
    signal: Annotated[Callable[..., Signal], Deferred(("router",))] | None
    num_sequences: int
    steps: int
    lr: float
    joint_lr: float

    def __post_init__(self) -> None:
        check_name(self.name, "router.name", parts=1)
        if self.steps < 0:
            raise ConfigError(f"router.steps: got {self.steps}, wanted 0 or more")
        if self.signal is not None and (self.lr <= 0 or self.joint_lr <= 0):
            raise ConfigError(f"router: got lr={self.lr}, joint_lr={self.joint_lr}, wanted positive learning rates")
        if self.prompt_tokens <= 0 or self.num_sequences <= 0:
            raise ConfigError(
                f"router: got prompt_tokens={self.prompt_tokens}, num_sequences={self.num_sequences}, wanted 1 or more"
            )
        if self.granularity == "prompt" and not self.per_token:
            raise ConfigError(
                "router.granularity: got prompt with a static policy, which chooses once for all tokens; "
                "set router.policy=dynamic"
            )
        if self.per_token and self.signal is None:
            raise ConfigError(
                f"router.policy: got dynamic, but router={self.name} learns nothing; set router.policy=static"
            )
        decides = getattr(getattr(self.network, "func", None), "per_token", self.per_token)  # functions make either
        if decides != self.per_token:
            policies = {True: "dynamic", False: "static"}
            raise ConfigError(
                f"router.policy: got {self.policy}, but router={self.name} has no such policy; set "
                f"router.policy={policies[decides]}"
            )

    @property
    def per_token(self) -> bool:
        """Whether tokens differ."""
        return self.policy == "dynamic"

    @property
    def label(self) -> str:
        """As in tables: `uniform`, `surrogate-static`, `value-dynamic-prompt`."""
        parts = [self.name, *([self.policy] if self.signal is not None else [])]
        return "-".join([*parts, "prompt"] if self.granularity == "prompt" else parts)


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
        check_name(self.experiment_name, "experiment_name", parts=8)
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
        axes = {
            name: replace(axis, layers=tuple(layers)) if isinstance(axis, Depth) else axis
            for name, axis in self.axes.items()
        }
        return replace(self, axes=axes)

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
        if settings is None or not any(by_token(each) for each in drawn):
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


def check(settings: Settings) -> None:
    """Raise before anything is loaded when the parts do not fit each other."""
    config = settings.model.decoder_config()
    settings.model.check_weights(dry_run=settings.dry_run)
    if settings.data.sequence_length > config.context_length:
        raise ConfigError(
            f"data.sequence_length: got {settings.data.sequence_length}, wanted at most "
            f"model.context_length={config.context_length}"
        )
    devices, nodes = (getattr(settings.trainer, "keywords", {}).get(name, 1) for name in ("devices", "num_nodes"))
    if isinstance(devices, int) and devices > 0 and devices * nodes > 1:
        settings.data.check_ranks(devices * nodes)
        if "strategy" not in getattr(settings.trainer, "keywords", {}):
            raise ConfigError(
                f"trainer.devices: got {devices} on {nodes} nodes, wanted 1: several devices need trainer=fsdp, or "
                "trainer=ddp"
            )
    check_tokenizer(settings)
    if settings.data.heldout_share is None:
        raise ConfigError("data.heldout_share: got null, wanted a share between 0 and 0.5")
    try:
        settings.optim.optimizer([nn.Parameter(torch.zeros(1))], lr=1e-3)
    except ValueError as error:
        raise ConfigError(f"optim.optimizer: {error}") from error
    for name in ("run_dir", "cache_dir"):
        path = getattr(settings, name)
        if path is not None and Path(path).is_file():
            raise ConfigError(f"{name}: {path} is a file, wanted a folder")
    if len(set(settings.latencies)) > 1:
        raise ConfigError(
            "costs.latency: differs from cost, which prices time as well; a run measures one table, so leave one out"
        )
    if settings.latency is not None and settings.latency.context_length > config.context_length:
        raise ConfigError(
            f"cost.context_length: got {settings.latency.context_length}, wanted at most "
            f"model.context_length={config.context_length}"
        )
    if settings.is_priced:
        check_budgets(settings)


def check_tokenizer(settings: Settings) -> None:
    """Raise where the tokenizer that is named, or that of the weights, is not there, damaged, or not the model's."""
    file, size = settings.tokenizer_file, settings.model.decoder_config().vocab_size
    if file is None:
        return
    if file.is_file():
        check_vocabulary(load_tokenizer(file), vocab_size=size)
        special = settings.special_tokens
        if special is not None and special.begin >= size:
            raise ConfigError(
                f"data.begin_token: that of {file} is token {special.begin}, model.vocab_size is {size}; name another"
            )
    elif settings.data.tokenizer is None:
        raise ConfigError(
            f"data.tokenizer: {file.parent} has no tokenizer.json, the only form of a tokenizer that is read; save it "
            "with transformers' AutoTokenizer and save_pretrained, or name another with data.tokenizer=FILE"
        )
    elif not settings.dry_run:
        raise ConfigError(f"data.tokenizer: {file} does not exist; wanted a tokenizer.json")


def check_budgets(settings: Settings) -> None:
    """Raise before anything is trained when a budget cannot be kept. Needs prices."""
    prices = settings.prices()
    router = settings.make_router()
    for budget in settings.budgets:
        prices.check(budget)
        router.check(budget)
    signal, values = settings.make_signal(router), settings.make_elastic_values()
    if signal is not None and values is not None:  # for their own checks only
        signal.warm_up(router, {"choices": torch.zeros(0, 0), **values.state_dict()})
