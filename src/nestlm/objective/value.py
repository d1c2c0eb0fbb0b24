"""The value signal (our choice): learn by plain regression what a narrower choice costs a token.

Choices are drawn at random, the model runs once with them and once whole, and the sum of the predicted values is fitted
to the KL between the two, token by token. No gradient passes through the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nestlm.data.batch import Batch
from nestlm.nn.loss import SoftTargets, forward_kl
from nestlm.nn.policy import WHOLE, Decision, Mixed, Policy, Stream
from nestlm.objective.base import Parts, Signal, Term, check_router
from nestlm.objective.exploration import random_choices, rank_correlation
from nestlm.router import value_dynamic, value_static
from nestlm.router.base import Router
from nestlm.router.per_token import features
from nestlm.seeding import torch_generator
from nestlm.spec import Site

HELD_OUT_ROUNDS = 4  # of random choices on the calibration text, to tell how well values predict


class ValueSignal(Signal):
    """Fits a value router."""

    lr = 0.0  # it has no network of its own

    def __init__(self, router: Router, *, skew: float, seed: int) -> None:
        """Set up the draws.

        Args:
            router: a value router.
            skew: how much sequences differ in the widths that are drawn for them.
            seed: seed of all draws.
        """
        super().__init__()
        check_router(router, (value_static.Router, value_dynamic.Router), signal="value")
        self.space, self.skew, self.seed = router.prices.space, skew, seed

    def terms(self, parts: Parts, batch: Batch, *, step: int) -> Iterator[Term]:
        predicted, target = self.observe(parts, batch, key=step)
        loss = (predicted - target).square().mean()
        spread = target.var(correction=0).clamp_min(1e-12)
        yield Term(loss, {"value_error": (loss / spread).detach(), "kl": target.mean()})

    def observe(self, parts: Parts, batch: Batch, *, key: int | str) -> tuple[Tensor, Tensor]:
        """Predicted and real growth of the KL under random choices: of tokens (B, L), or of sequences (B,)."""
        router = parts.router
        assert isinstance(router, value_static.Router | value_dynamic.Router), "values are learned by a value router"
        tokens_BL = batch.tokens_BL
        indices = random_choices(
            self.space,
            tokens_BL.shape,
            per_token=router.per_token,
            skew=self.skew,
            generator=torch_generator(self.seed, "value", key),
        ).to(tokens_BL.device)
        values: list[Tensor] = []
        with torch.no_grad():
            whole = SoftTargets.of(parts.decoder(tokens_BL, documents_BL=batch.documents_BL).logits_BLV)
            policy = observing(router, indices, values)
            mixed_BLV = parts.decoder(tokens_BL, policy, documents_BL=batch.documents_BL).logits_BLV
            kl_BL = forward_kl(mixed_BLV, whole)
        total = torch.stack(values).sum(0)
        return (total, kl_BL) if router.per_token else (total[:, 0], kl_BL.mean(1))

    def summary(self, parts: Parts, held_out: list[Batch]) -> dict[str, float | None]:
        """Error relative to the variance, and rank correlation, of predictions on held-out text."""
        if not held_out:
            return {}
        with torch.no_grad():
            pairs = [
                self.observe(parts, batch, key=f"held out/{number}/{round_}")
                for round_ in range(HELD_OUT_ROUNDS)
                for number, batch in enumerate(held_out)
            ]
        predicted, real = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
        error = (predicted - real).square().mean() / real.var(correction=0).clamp_min(1e-12)
        return {"value_error": float(error), "rank_correlation": rank_correlation(predicted, real)}

    def forward_passes(self, mean_share: float) -> float:
        """The whole model and one random choice."""
        return 1.0 + mean_share


def observing(router: value_static.Router | value_dynamic.Router, indices: Tensor, values: list[Tensor]) -> Policy:
    """Run given choices, and note what the router's networks predict of them, with gradients to the networks."""
    rows = {site: row for row, site in enumerate(router.prices.space.sites)}

    def policy(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        del stream
        row = rows.get(site)
        if row is None:
            return WHOLE
        index = indices[row]
        with torch.enable_grad():
            value_BLK = router.values(row, features(hidden_BLD.detach()))
            index_BL = index if index.ndim == 2 else index[:, None]
            values.append(value_BLK.expand(*index_BL.shape, -1).gather(-1, index_BL[..., None]).squeeze(-1))
        return Decision(Mixed(router.prices.space.choices[site], index))

    return policy
