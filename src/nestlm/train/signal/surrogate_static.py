"""The surrogate signal of Flextron (arXiv 2406.10260) for static routers: a small model learns the loss of choices.

Router gradients vanish through the LLM. So a surrogate is fitted to pairs (choices, loss) that forward passes yield.
While its error is below a threshold, the router descends the surrogate's output plus a cost loss. Afterwards the
surrogate is thrown away. Our choices are its target, by default the gap to the full model's loss on the same batch; its
shape, an additive path plus an MLP; its input, the softmax of the router's logits; and the replay of earlier pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.decoder import Decoder
from nestlm.nn.loss import LossFn
from nestlm.nn.policy import fixed
from nestlm.router.base import Router
from nestlm.router.networks import added_losses
from nestlm.router.protocols import BudgetLogits, check_router, narrow
from nestlm.router.relaxed import budget_loss, entropy, sample_choices
from nestlm.spec import SearchSpace
from nestlm.train.objective.base import Signal, StageModels, Term
from nestlm.train.objective.elastic_values import static_value_steps
from nestlm.train.signal.exploration import random_choices, rank_correlation
from nestlm.utils.seeding import torch_generator

ERROR_MEMORY = 0.9  # weight of the past in the running error
TARGETS = ("gap", "loss")
BUDGETS_PER_STEP = 64  # at which the router is trained; they cost no forward pass of the LLM
HELD_OUT_SPECS = 32
WARM_UP_STEPS = 200


@dataclass(frozen=True)
class PairSettings:
    """The pairs (choices, loss) to which a surrogate is fitted. A dynamic router's surrogate uses `warm_start` alone.

    Attributes:
        specs_per_step: pairs that each step adds, one sub-network each.
        replay: number of pairs that are kept, the newest.
        warm_start: whether to begin with what elastic training recorded: pairs, or values of choices.
    """

    specs_per_step: int
    replay: int
    warm_start: bool

    def __post_init__(self) -> None:
        if not 0 < self.specs_per_step <= self.replay:
            raise ConfigError(
                f"router.signal.pairs: got specs_per_step={self.specs_per_step}, replay={self.replay}, wanted 1 or "
                "more, and room for them"
            )


class Surrogate(nn.Module):
    """Predicts a loss from distributions over choices: what each choice adds, plus an MLP for the rest (our choice).

    Attributes:
        steps: numbers that `added_losses` turns into what each choice adds, (sites, max choices).
        is_step: True where a site has a next wider choice.
    """

    is_step: Tensor

    def __init__(self, space: SearchSpace, *, hidden_width: int) -> None:
        super().__init__()
        inputs = len(space.sites) * space.max_choices
        self.steps = nn.Parameter(torch.zeros(len(space.sites), space.max_choices))
        self.rest = nn.Sequential(nn.Linear(inputs, hidden_width), nn.LeakyReLU(0.1), nn.Linear(hidden_width, 1))
        counts = torch.tensor([len(widths) for widths in space.choices.values()])
        self.register_buffer("is_step", torch.arange(space.max_choices) < counts[:, None] - 1, persistent=False)

    def init_weights(self, *, generator: torch.Generator) -> None:
        """Draw the first layer of the MLP; everything else starts at 0, so that the additive path leads."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            first = self.rest[0].weight
            assert isinstance(first, Tensor)
            first.copy_(torch.randn(first.shape, generator=generator) * first.shape[1] ** -0.5)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Predict losses in nats: distributions (n, sites, max choices) to (n,)."""
        effects = added_losses(self.steps.masked_fill(~self.is_step, -torch.inf))
        rest = self.rest(probabilities.flatten(1).to(effects.dtype))
        return (probabilities * effects).sum((1, 2)) + rest.squeeze(-1)


class StaticSurrogateSignal(Signal):
    """Fits a surrogate to the losses of drawn sub-networks, and trains the router on the surrogate.

    Attributes:
        inputs: one-hot choices of the kept pairs, (replay, sites, max choices).
        targets: their losses or gaps in nats, (replay,).
        count: number of pairs ever added.
        error: running squared error of predictions, relative to the variance of the targets; inf before the first step.
    """

    inputs: Tensor
    targets: Tensor
    count: Tensor
    error: Tensor

    def __init__(
        self,
        router: Router,
        *,
        target: str,
        random_share: float,
        gate: float,
        cost_weight: float,
        dead_zone: float,
        entropy_weight: float,
        pairs: PairSettings,
        hidden_width: int,
        lr: float,
        seed: int,
    ) -> None:
        """Set up the surrogate.

        Args:
            router: a static router.
            target: `gap` to the full model's loss on the batch, or `loss` itself (the paper).
            random_share: share of the pairs drawn at random rather than from the router.
            gate: routers are trained while the surrogate's running squared error, relative to the variance of its
                targets, is below this.
            cost_weight: lambda of the cost loss.
            dead_zone: relative distance from the budget that costs nothing.
            entropy_weight: of the entropy, summed over sites, that router distributions are rewarded for. It makes them
                softmaxes of effects, so that their logarithms tell the second best choice, too (our choice).
            pairs: how many are made and remembered.
            hidden_width: of the surrogate's MLP.
            lr: the surrogate's peak learning rate.
            seed: seed of all draws.
        """
        super().__init__()
        if target not in TARGETS:
            raise ConfigError(f"router.signal.target: got {target!r}, wanted one of {', '.join(TARGETS)}")
        check_router(router, BudgetLogits, signal="surrogate")
        table = self.table = router.prices.main
        self.target, self.pairs, self.random_share = target, pairs, random_share
        self.gate, self.cost_weight, self.dead_zone = gate, cost_weight, dead_zone
        self.entropy_weight = entropy_weight
        self.lr, self.seed = lr, seed
        sites, choices = len(table.space.sites), table.space.max_choices
        self.surrogate = Surrogate(table.space, hidden_width=hidden_width)
        self.surrogate.init_weights(generator=torch_generator(seed, "surrogate"))
        self.register_buffer("inputs", torch.zeros(pairs.replay, sites, choices))
        self.register_buffer("targets", torch.zeros(pairs.replay))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("error", torch.full((), torch.inf))

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        router = narrow(models.router, BudgetLogits)
        inputs, targets = self.observe(models.decoder, batch, choices=self.draw_choices(router, step=step))
        targets = batch.row_shard.all_reduce_mean(targets)
        with torch.no_grad():
            fresh_error = (self.surrogate(inputs) - targets).square().mean()
        self.add_pairs(inputs, targets)
        known = min(int(self.count), len(self.targets))
        known_inputs, known_targets = self.inputs[:known], self.targets[:known]
        relative = fresh_error / known_targets.var(correction=0).clamp_min(1e-12)
        first = not torch.isfinite(self.error)
        self.error.copy_(relative if first else ERROR_MEMORY * self.error + (1 - ERROR_MEMORY) * relative)
        loss = (self.surrogate(known_inputs) - known_targets).square().mean()
        is_open = float(self.error) < self.gate
        yield Term(loss, {"surrogate_error": self.error.clone(), "gate_open": float(is_open)})
        if is_open:
            yield self.router_term(router, step=step)

    @override
    def warm_up(self, router: Router, record: Mapping[str, Tensor]) -> None:
        """Start with the values of elastic training, and fit the pairs that it recorded (our choice)."""
        del router
        if not self.pairs.warm_start:
            return
        steps = static_value_steps(record, self.table.space)
        if steps is not None:
            with torch.no_grad():
                self.surrogate.steps.copy_(steps)
        choices = record["choices"][-len(self.targets) :]
        if not len(choices):
            return
        targets = record["gaps" if self.target == "gap" else "losses"][-len(self.targets) :]
        self.add_pairs(one_hot(choices, self.table.space.max_choices), targets)
        inputs, targets = self.inputs[: len(choices)], self.targets[: len(choices)]
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        for _ in range(WARM_UP_STEPS):
            optimizer.zero_grad()
            (self.surrogate(inputs) - targets).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()

    @override
    @torch.no_grad()
    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """Return the surrogate's running relative error, and the rank correlation of its predictions.

        The correlation is that of predicted with measured losses, on calibration text, of HELD_OUT_SPECS random specs.
        """
        error = float(self.error)
        found: dict[str, float | None] = {"surrogate_error": error if math.isfinite(error) else None}
        if not held_out:
            return found
        choices = random_choices(
            self.table.space,
            (HELD_OUT_SPECS, 1),
            per_token=False,
            skew=1.0,
            generator=torch_generator(self.seed, "held out"),
        ).T
        observed = [self.observe(models.decoder, batch, choices=choices.to(self.targets.device)) for batch in held_out]
        real = torch.stack([targets for _, targets in observed]).mean(0)
        return found | {"rank_correlation": rank_correlation(self.surrogate(observed[0][0]), real)}

    @override
    def forward_passes(self, mean_share: float) -> float:
        # one pass a pair, and the full model's for the gap
        return self.pairs.specs_per_step * mean_share + (1.0 if self.target == "gap" else 0.0)

    @torch.no_grad()
    def draw_choices(self, router: BudgetLogits, *, step: int) -> Tensor:
        """Draw specs to learn from, partly from the router, partly at random: choice indices (specs, sites)."""
        number = self.pairs.specs_per_step
        logits = router.budget_logits(self.draw_shares(number, step=step, purpose="pairs"))
        generator = torch_generator(self.seed, "choices", step)
        at_random = torch.rand(number, 1, 1, generator=generator) < self.random_share
        flat = torch.zeros_like(logits).masked_fill(logits.isneginf(), -torch.inf)
        return sample_choices(torch.where(at_random.to(logits.device), flat, logits), generator=generator)

    @torch.no_grad()
    def observe(self, decoder: Decoder, batch: Batch, *, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Measure specs on a batch.

        Args:
            decoder: the nested model.
            batch: the rows to measure on.
            choices: choice indices, (specs, sites).

        Returns:
            One-hot choices (specs, sites, max choices), and losses or gaps in nats, (specs,).
        """
        space = self.table.space
        seen = {"documents_BL": batch.documents_BL, "output_fn": LossFn(batch.targets_BL)}
        losses = []
        for row in choices.tolist():
            policy = fixed(space.spec(dict(zip(space.sites, row, strict=True))))
            losses.append(decoder(batch.tokens_BL, policy, **seen).output.loss)
        targets = torch.stack(losses)
        if self.target == "gap":
            targets = targets - decoder(batch.tokens_BL, **seen).output.loss
        return one_hot(choices, space.max_choices), targets

    @torch.no_grad()
    def add_pairs(self, inputs: Tensor, targets: Tensor) -> None:
        """Put pairs in place of the oldest ones: one-hot choices (n, sites, max choices) and losses (n,)."""
        slots = (torch.arange(len(targets), device=self.targets.device) + self.count) % len(self.targets)
        self.inputs[slots] = inputs.to(self.inputs)
        self.targets[slots] = targets.to(self.targets)
        self.count += len(targets)

    def router_term(self, router: BudgetLogits, *, step: int) -> Term:
        """Return the frozen surrogate's output for the router's distributions, plus the cost loss, less the entropy."""
        shares = self.draw_shares(BUDGETS_PER_STEP, step=step, purpose="budgets")
        logits = router.budget_logits(shares)
        probabilities = logits.softmax(-1)
        frozen = {name: parameter.detach() for name, parameter in self.surrogate.named_parameters()}
        predicted = functional_call(self.surrogate, frozen, (probabilities,)).mean()
        distance = budget_loss(self.table.expected_share(probabilities), shares, dead_zone=self.dead_zone).mean()
        logs = {"predicted": predicted.detach(), "budget_distance": distance.detach()}
        reward = self.entropy_weight * entropy(logits).sum(-1).mean()
        return Term(predicted + self.cost_weight * distance - reward, logs)

    def draw_shares(self, number: int, *, step: int, purpose: str) -> Tensor:
        """Draw budgets as shares, uniform between the smallest sub-network and the full model, (number,)."""
        floor = self.table.share(self.table.space.smallest())
        uniform = torch.rand(number, generator=torch_generator(self.seed, purpose, step))
        return (floor + (1.0 - floor) * uniform).to(self.targets)


def one_hot(choices: Tensor, num_choices: int) -> Tensor:
    """Turn choice indices (n, sites) into the surrogate's input, (n, sites, choices)."""
    return nn.functional.one_hot(choices, num_choices).float()
