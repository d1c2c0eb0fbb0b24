"""The surrogate signal of Flextron (arXiv 2406.10260) for dynamic routers, with targets per token (our choice).

The surrogate predicts each token's KL from the whole model (or its loss, nearest to the paper) from the token's choices
and hidden states: a target that is pooled over tokens could tell one token from another only by accident. As for static
routers it is fitted to drawn choices, and while its error is below a threshold, the router descends its output plus a
cost loss. Afterwards the surrogate is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.errors import ConfigError
from nestlm.nn.loss import HeadInputs, LossFn
from nestlm.nn.policy import FULL, Decision, Policy, Stream, Width
from nestlm.router.base import Router
from nestlm.router.dynamic.base import features
from nestlm.router.networks import SiteNetworks, added_losses
from nestlm.router.protocols import TokenLogits, check_router, narrow
from nestlm.router.relaxed import budget_loss, entropy, sample_choices
from nestlm.spec import Site
from nestlm.train.objective.base import Signal, StageModels, Term
from nestlm.train.objective.elastic_values import load_values, select_prefix
from nestlm.train.signal.exploration import random_choices, rank_correlation
from nestlm.train.signal.surrogate_static import ERROR_MEMORY, TARGETS
from nestlm.utils.seeding import torch_generator

SKEW = 1.0  # of random choices, see `random_choices`


class DynamicSurrogateSignal(Signal):
    """Fits a surrogate to the losses of tokens under drawn choices, and trains the router on the surrogate.

    Attributes:
        error: running squared error of sequences' mean predictions, relative to the variance of the targets; inf before
            the first step.
    """

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
        warm_start: bool,
        hidden_width: int,
        lr: float,
        seed: int,
    ) -> None:
        """Set up the surrogate.

        Args:
            router: a dynamic router.
            target: `gap`, the KL to the whole model, or `loss`, the raw loss of the token.
            random_share: share of the sequences whose choices are drawn at random rather than from the router.
            gate: routers are trained while the surrogate's running squared error on sequences' means, relative to their
                variance, is below this.
            cost_weight: lambda of the cost loss.
            dead_zone: relative distance from the budget that costs nothing.
            entropy_weight: of the entropy, summed over sites, that router distributions are rewarded for. It makes them
                softmaxes of effects, so that their logarithms tell the second best choice, too (our choice).
            warm_start: whether to begin with the values of choices that elastic training learned.
            hidden_width: of the surrogate's networks.
            lr: the surrogate's peak learning rate.
            seed: seed of all draws.
        """
        super().__init__()
        self.warm_start = warm_start
        check_router(router, TokenLogits, signal="surrogate")
        if target not in TARGETS:
            raise ConfigError(f"router.signal.target: got {target!r}, wanted one of {', '.join(TARGETS)}")
        self.target, self.random_share, self.gate = target, random_share, gate
        self.cost_weight, self.dead_zone, self.lr, self.seed = cost_weight, dead_zone, lr, seed
        self.entropy_weight = entropy_weight
        self.effects = SiteNetworks(
            router.prices.space,
            num_inputs=narrow(router, TokenLogits).hidden_size,
            hidden_width=hidden_width,
            init_std=0.1,
        )
        self.effects.init_weights(seed=seed)
        self.base = torch.nn.Parameter(torch.zeros(()))  # what the whole model loses, where the target is the loss
        self.register_buffer("error", torch.full((), torch.inf))

    @override
    def warm_up(self, router: Router, record: Mapping[str, Tensor]) -> None:
        """Start with the values of elastic training (our choice).

        Raises:
            ConfigError: they were learned by networks of another width.
        """
        del router
        known = select_prefix(record, "dynamic.")
        if self.warm_start and known:
            load_values(self.effects, known, width="router.signal.hidden_width", cure="router.signal.pairs.warm_start")

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        router = narrow(models.router, TokenLogits)
        drawn = TokenPredictions(self, router, batch, key=step)
        target_BL = self.run(models, batch, drawn)
        predicted_BL = drawn.predicted_BL + self.base
        loss = (predicted_BL - target_BL).square().mean()
        with torch.no_grad():
            missed_B, targets_B = (
                batch.row_shard.all_gather(part.mean(1)) for part in (predicted_BL - target_BL, target_BL)
            )
            off = missed_B.square().mean() / targets_B.var(correction=0).clamp_min(1e-12)
            first = not torch.isfinite(self.error)
            self.error.copy_(off if first else ERROR_MEMORY * self.error + (1 - ERROR_MEMORY) * off)
        is_open = float(self.error) < self.gate
        yield Term(loss, {"surrogate_error": self.error.clone(), "gate_open": float(is_open)})
        if is_open:
            table = router.prices.main
            expected_B = table.constant / table.whole + drawn.expected_B
            distance = budget_loss(expected_B, drawn.shares_B, dead_zone=self.dead_zone).mean()
            logs = {"predicted": drawn.promised.detach(), "budget_distance": distance.detach()}
            reward = self.entropy_weight * drawn.entropy
            yield Term(drawn.promised + self.cost_weight * distance - reward, logs)

    @torch.no_grad()
    def run(self, models: StageModels, batch: Batch, drawn: TokenPredictions) -> Tensor:
        """Run the model under drawn choices; return the loss, or the KL from the whole model, of each token, (B, L)."""
        whole = None
        if self.target == "gap":
            whole = models.decoder(
                batch.tokens_BL, documents_BL=batch.documents_BL, output_fn=HeadInputs.detached
            ).output
        output_fn = LossFn(batch.targets_BL, teacher=whole)
        losses = models.decoder(
            batch.tokens_BL, drawn.policy(), documents_BL=batch.documents_BL, output_fn=output_fn
        ).output
        return losses.nll_BL if whole is None else losses.kl_BL

    @override
    def summary(self, models: StageModels, held_out: list[Batch]) -> dict[str, float | None]:
        """Return the running error, and the rank correlation of predicted with measured means of sequences."""
        error = float(self.error)
        found: dict[str, float | None] = {"surrogate_error": error if math.isfinite(error) else None}
        if not held_out:
            return found
        router = narrow(models.router, TokenLogits)
        predicted, real = [], []
        for number, batch in enumerate(held_out):
            drawn = TokenPredictions(self, router, batch, key=f"held out/{number}", random_share=1.0)
            real.append(self.run(models, batch, drawn).mean(1))
            predicted.append(drawn.predicted_BL.detach().mean(1))
        return found | {"rank_correlation": rank_correlation(torch.cat(predicted), torch.cat(real))}

    @override
    def forward_passes(self, mean_share: float) -> float:
        # one routed pass, and the whole model's for the gap
        return mean_share + (1.0 if self.target == "gap" else 0.0)


class TokenPredictions:
    """Draws choices for a batch, and sums over sites what surrogate and router predict while the model runs them.

    Attributes:
        shares_B: budgets that were drawn for the sequences, as shares.
        predicted_BL: predicted loss of the drawn choices, with gradients to the surrogate.
        promised: predicted loss of the router's distributions, a mean over tokens, with gradients to the router only.
        entropy: of those distributions, summed over sites, a mean over tokens.
        expected_B: expected cost of the distributions as a share, without the constant, a mean over each sequence.
    """

    def __init__(
        self,
        signal: DynamicSurrogateSignal,
        router: TokenLogits,
        batch: Batch,
        *,
        key: int | str,
        random_share: float | None = None,
    ) -> None:
        self.signal, self.router = signal, router
        table, tokens_BL = router.prices.main, batch.tokens_BL
        generator = torch_generator(signal.seed, "surrogate", key)
        floor = router.floor
        rows, length = batch.row_shard.global_rows(len(tokens_BL)), tokens_BL.shape[1]
        shares_B = floor + (1.0 - floor) * torch.rand(rows, generator=generator)
        share = signal.random_share if random_share is None else random_share
        at_random_B = torch.rand(rows, generator=generator) < share
        indices = random_choices(table.space, (rows, length), per_token=True, skew=SKEW, generator=generator)
        self.shares_B, self.at_random_B = (
            batch.row_shard.local_rows(part).to(tokens_BL.device) for part in (shares_B, at_random_B)
        )
        self.random = batch.row_shard.local_rows(indices, dim=1).to(tokens_BL.device)
        self.generator, self.rows = generator, batch.row_shard
        zeros = self.shares_B.new_zeros(())
        self.predicted_BL, self.promised, self.entropy, self.expected_B = zeros, zeros, zeros, zeros

    def policy(self) -> Policy:
        """Return the policy that runs the drawn choices and adds up the predictions."""

        def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
            del stream
            row = self.router.rows.get(site)
            return FULL if row is None else self.observe(row, features(hidden_BLD.detach()))

        return policy

    def observe(self, row: int, features_BLD: Tensor) -> Decision:
        """Draw the choices of one site (by row) and add the predictions; returns the decision for the decoder."""
        space = self.router.prices.space
        with torch.enable_grad():
            logits_BLK = self.router.token_logits(row, features_BLD, self.shares_B)
            effects_BLK = added_losses(self.signal.effects.at(row, features_BLD))
            routed_BL = sample_choices(logits_BLK.detach(), generator=self.generator, row_shard=self.rows)
            index_BL = torch.where(self.at_random_B[:, None], self.random[row], routed_BL)
            probabilities_BLK = logits_BLK.softmax(-1)
            prices_K = self.router.prices.main.shares[row, : logits_BLK.shape[-1]].to(probabilities_BLK)
            self.predicted_BL = self.predicted_BL + effects_BLK.gather(-1, index_BL[..., None]).squeeze(-1)
            self.promised = self.promised + (probabilities_BLK * effects_BLK.detach()).sum(-1).mean()
            self.entropy = self.entropy + entropy(logits_BLK).mean()
            self.expected_B = self.expected_B + (probabilities_BLK * prices_K).sum(-1).mean(1)
        return Decision(Width.per_row(space.choices[space.sites[row]], index_BL))
