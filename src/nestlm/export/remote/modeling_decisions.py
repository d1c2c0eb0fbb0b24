"""Choose a width for each token at each site, within a budget for each document.

A decision depends on the token and on earlier tokens only. The state of a document (what it has spent so far) is kept
with its KV cache, so decoding token by token gives the same decisions as one pass over all tokens. A document starts at
a token that attends to no earlier token. Its state starts anew there, so documents that share a row decide as each does
alone. A token bucket keeps the budget: each token adds a refill (`income`), and each choice takes its price.

Letters of shapes: B batch, L tokens, D model width, K choices of a site, J multipliers, R documents, n tokens (flat).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

PATIENCE = 32  # weight of calibration text in the counts of a new document, in tokens
START = 4.0  # shift of predicted losses at the start of training: softplus(-4) is small

Site = tuple[int, int]  # layer, and position in the order in which a layer's axes decide


class Documents:
    """Positions of the documents in a batch, to move each document into a row of its own and back.

    Attributes:
        place_n: flat position of each token of the batch in the documents' rows.
        real_RL: False at padding, and after the end of a document.
        row_R: row of the batch in which each document lies.
        begins_R: False for a document that continues from an earlier call.
        last_B: index of the last document in each row of the batch.
    """

    def __init__(self, mask: Tensor, start: int, *, batch: int, length: int) -> None:
        keys = torch.arange(mask.shape[-1], device=mask.device)
        offset = min(start, len(keys) - length)  # of this call's first token among the keys
        seen_BLS = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0).expand(batch, -1, -1)
        own_BL = seen_BLS.diagonal(offset, dim1=1, dim2=2)
        earlier_BL = (seen_BLS & (keys < keys[offset : offset + length, None])).any(-1)
        begins_n = (own_BL & ~earlier_BL).flatten()
        splits_BL = begins_n.view(batch, length).clone()
        splits_BL[:, 0] = True
        document_n = splits_BL.flatten().cumsum(0) - 1
        first_R = splits_BL.flatten().nonzero()[:, 0]
        slot_n = torch.arange(batch * length, device=mask.device) - first_R[document_n]
        self.shape = len(first_R), int(slot_n.max()) + 1
        self.place_n = document_n * self.shape[1] + slot_n
        self.real_RL = self.spread(own_BL)
        self.row_R, self.begins_R = first_R // length, begins_n[first_R]
        self.last_B = document_n.view(batch, length)[:, -1]

    def spread(self, each_BL: Tensor) -> Tensor:
        """Move each document into a row of its own: (B, L, ...) to (R, L, ...), with zeros after a document's end."""
        empty = each_BL.new_zeros(self.shape[0] * self.shape[1], *each_BL.shape[2:])
        return empty.index_copy(0, self.place_n.to(empty.device), each_BL.flatten(0, 1)).unflatten(0, self.shape)

    def gather(self, each_RL: Tensor, shape: torch.Size) -> Tensor:
        """Move documents back to their places in the batch: (R, L, ...) to `shape`, (B, L). Inverts `spread`."""
        return each_RL.flatten(0, 1)[self.place_n.to(each_RL.device)].view(shape)


class Routing:
    """State of the documents of one call by site: `before` the call, as kept with the KV cache, and `after` it.

    A layer that runs twice (gradient checkpointing) reads the same state and writes the same state again.
    """

    def __init__(self) -> None:
        self.entered = False
        self.cache: Cache | None = None
        self.documents: Documents | None = None
        self.before: dict[Site, Tensor] = {}
        self.after: dict[Site, Tensor] = {}
        self.saved: dict[Site, Tensor] = {}  # refills beyond what documents spend, if they decide once and in this call

    def enter(self, mask: Tensor | None, cache: Cache | None, *, batch: int, length: int) -> None:
        """Find the documents in the mask, and read their state from the cache. Calls after the first do nothing.

        Args:
            mask: attention mask (B or 1, 1, L, S), bool or added to scores; None: one document per row, no padding.
            cache: the KV cache; None: there is none.
            batch: number of rows.
            length: number of tokens per row in this call.

        Raises:
            ValueError: the cache holds other tokens than those for which this model decided.
        """
        if self.entered:
            return
        self.entered, self.cache = True, cache
        start = 0 if cache is None else int(cache.get_seq_length())
        if start:
            known, self.before = cache.__dict__.get("routing", (0, {}))
            if known != start or any(len(kept) != batch for kept in self.before.values()):
                raise ValueError(
                    f"got a KV cache of {start} tokens in {batch} rows, wanted one that this model filled, whole "
                    "and for as many rows: what a sequence has spent cannot be cropped, repeated or handed on"
                )
        if mask is not None:
            self.documents = Documents(mask, start, batch=batch, length=length)

    def kept(self, site: Site, opening: Tensor) -> Tensor:
        """Return each document's state at a site from earlier calls, or its row of `opening` if it starts here."""
        before = self.before.get(site)
        if before is None or self.documents is None:
            return opening if before is None else before
        begins_R = self.documents.begins_R.to(before.device).view(-1, *[1] * (before.ndim - 1))
        return torch.where(begins_R, opening, before[self.documents.row_R.to(before.device)])

    def leave(self) -> None:
        """Keep the state of the last document of each row with the KV cache, and forbid reordering the cache's rows."""
        if self.cache is None:
            return
        after = self.after
        if self.documents is not None:
            after = {site: kept[self.documents.last_B.to(kept.device)] for site, kept in after.items()}
        vars(self.cache).update(
            routing=(int(self.cache.get_seq_length()), after), reorder_cache=refuse, batch_select_indices=refuse
        )


def refuse(*_: Any, **__: Any) -> None:
    """Raise ValueError, in place of methods of a cache that move keys between rows."""
    raise ValueError("rows of this model's KV cache cannot be reordered: what a sequence has spent stays with it")


class Chooser(nn.Module):
    """Choose a width for each token at one site: a network scores the choices, token buckets keep the budget.

    A score is a log-probability (`kind` is "logits") or minus a predicted loss. Prices are integers in fixed-point
    units; a budget has one or more bounds, each with prices and a refill (`incomes`) of its own.
    """

    def __init__(self, router: dict, *, hidden_size: int, choices: int) -> None:
        super().__init__()
        self.kind, self.prompt_tokens, self.choices = router["kind"], router["prompt_tokens"], choices
        width, bounds, levels = router["hidden_width"], router["bounds"], router["levels"]
        self.input = nn.Parameter(torch.zeros(hidden_size, width))
        self.input_bias = nn.Parameter(torch.zeros(width))
        self.output = nn.Parameter(torch.zeros(width, choices))
        self.output_bias = nn.Parameter(torch.zeros(choices))
        # `budget` is added to the hidden layer. `scale` multiplies predicted losses, so that sites share a unit. `held`
        # is added to logits and cancels the penalty for cost that they contain.
        self.budget = nn.Buffer(torch.zeros(width))
        self.scale = nn.Buffer(torch.zeros(choices))
        self.held = nn.Buffer(torch.zeros(choices))
        # `priced`: cost of the choices at each multiplier, in units of score. The others are integers for each bound:
        # prices, refill of a token, spending of a token to aim at, and mean spending at each multiplier.
        self.priced = nn.Buffer(torch.zeros(levels, choices))
        self.prices = nn.Buffer(torch.zeros(bounds, choices, dtype=torch.long))
        self.incomes = nn.Buffer(torch.zeros(bounds, dtype=torch.long))
        self.aims = nn.Buffer(torch.zeros(bounds, dtype=torch.long))
        self.demands = nn.Buffer(torch.zeros(bounds, levels, dtype=torch.long))

    def scores(self, hidden_BLD: Tensor) -> Tensor:
        """Compute the score of each choice, (B, L, D) to (B, L, K); higher is better."""
        features = F.rms_norm(hidden_BLD, hidden_BLD.shape[-1:])
        inner = F.linear(features, self.input.T) + self.input_bias
        if self.kind == "logits":
            inner = inner + self.budget
        said = F.linear(F.leaky_relu(inner, 0.1), self.output.T, self.output_bias)
        if self.kind == "logits":
            return said.log_softmax(-1) + self.held
        losses = F.softplus(said[..., :-1] - START).flip(-1).cumsum(-1).flip(-1)
        return -torch.cat((losses, torch.zeros_like(said[..., :1])), dim=-1) * self.scale

    def wanted(self, scores: Tensor) -> Tensor:
        """Return the choices of highest score minus cost at each of J multipliers: (..., K) to (J, ...)."""
        return (scores - self.priced.to(scores.dtype).view(len(self.priced), *[1] * (scores.ndim - 1), -1)).argmax(-1)

    @torch.no_grad()
    def decide(self, hidden_BLD: Tensor, routing: Routing, site: Site) -> Tensor:
        """Choose for each token, (B, L, D) to choice indices (B, L), and store the documents' state in `routing`."""
        scores, real, documents = self.scores(hidden_BLD), None, routing.documents
        if documents is not None:
            scores, real = documents.spread(scores), documents.real_RL.to(scores.device)
        kept = routing.kept(site, self.opening(len(scores)))
        if self.prompt_tokens:
            index, routing.after[site] = self.by_prompt(scores, real, kept, routing.saved, site)
        else:
            index, routing.after[site] = self.draws_per_token(scores, real, kept)
        return index if documents is None else documents.gather(index, hidden_BLD.shape[:2])

    def opening(self, rows: int) -> Tensor:
        """Return the state of new documents, one for each of `rows` rows."""
        if self.prompt_tokens:  # columns: K sums of scores, tokens seen, the decision or -1
            return F.pad(self.scale.new_zeros(rows, self.choices + 1, dtype=torch.float64), (0, 1), value=-1.0)
        each = torch.cat((torch.zeros_like(self.prices), PATIENCE * (self.demands - self.aims[:, None])), dim=1)
        return each.expand(rows, -1, -1)

    def draws_per_token(self, scores_BLK: Tensor, real_BL: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Choose for each token at its document's own multiplier, within what its token buckets can pay.

        A token uses the smallest of J multipliers at which earlier tokens would have spent no more than aimed at.

        Args:
            scores_BLK: scores of the choices, one document per row.
            real_BL: False for padding; None: there is none.
            kept: state of the documents, (B, bounds, K + J): K balances, then J counts of spending beyond the aim.

        Returns:
            Choice indices (B, L), and the state after the last token.
        """
        choices = self.choices
        wanted_JBL = self.wanted(scores_BLK)
        over, counts = [], []
        for prices_K, aim, count_BJ in zip(self.prices, self.aims, kept[:, :, choices:].unbind(1), strict=True):
            beyond_JBL = (prices_K - aim).take(wanted_JBL)
            if real_BL is not None:
                beyond_JBL = beyond_JBL * real_BL
            after_JBL = beyond_JBL.cumsum(2) + count_BJ.T[..., None]
            over.append(after_JBL > beyond_JBL)
            counts.append(after_JBL[..., -1].T)
        level_BL = torch.stack(over).any(0).sum(0).clamp_max(len(wanted_JBL) - 1)
        index_BL = wanted_JBL.gather(0, level_BL[None])[0]
        left = []
        for bound, (prices_K, income) in enumerate(zip(self.prices, self.incomes, strict=True)):
            index_BL, account_BK = grant(index_BL, prices_K, income, real_BL, kept[:, bound, :choices])
            left.append(torch.cat((account_BK, counts[bound]), dim=1))
        return index_BL, torch.stack(left, dim=1)

    def by_prompt(
        self, scores_BLK: Tensor, real_BL: Tensor | None, kept: Tensor, saved: dict[Site, Tensor], site: Site
    ) -> tuple[Tensor, Tensor]:
        """Choose full width for a document's first `prompt_tokens` tokens, and one choice for all tokens after them.

        That choice is the best by the mean scores of the first tokens, limited by what the document can pay.

        Args:
            scores_BLK: scores of the choices, one document per row.
            real_BL: False for padding; None: there is none.
            kept: state of the documents, (B, K + 2): sums of scores, tokens seen, the decision or -1.
            saved: refills left over at each site that decided in this call, (B, bounds); this site's are added.
            site: this site.

        Returns:
            Choice indices (B, L), and the state after the last token.
        """
        limit, choices = self.prompt_tokens, self.choices
        if real_BL is None:
            real_BL = scores_BLK.new_ones(scores_BLK.shape[:2], dtype=torch.bool)
        sums_BK, seen_B, decided_B = kept[:, :choices], kept[:, choices], kept[:, -1].long()
        position_BL = seen_B.long()[:, None] + real_BL.cumsum(1) - 1
        sums_BK = sums_BK + (scores_BLK * (real_BL & (position_BL < limit))[..., None]).sum(1)
        seen_B = seen_B + real_BL.sum(1)
        deciding_B = (decided_B < 0) & (seen_B >= limit)
        if bool(deciding_B.any()):
            choice_B = self.affordable(self.wanted(sums_BK / limit)[0], [saved[at] for at in saved if at < site])
            decided_B = torch.where(deciding_B, choice_B, decided_B)
            saved[site] = self.incomes - self.prices.T[choice_B]
        index_BL = torch.where(real_BL & (position_BL >= limit), decided_B.clamp_min(0)[:, None], choices - 1)
        return index_BL, torch.cat((sums_BK, seen_B[:, None], decided_B[:, None].to(sums_BK)), dim=1)

    def affordable(self, wanted_B: Tensor, saved: list[Tensor]) -> Tensor:
        """Limit choices (B,) to those that this site's refill and refills left over at earlier sites can pay.

        Args:
            wanted_B: preferred choices.
            saved: refills left over at each earlier site, (B, bounds).
        """
        for bound, (prices_K, income) in enumerate(zip(self.prices, self.incomes, strict=True)):
            left_B = income + sum(each[:, bound].to(income.device) for each in saved)
            reach_B = torch.searchsorted(prices_K, left_B.expand(len(wanted_B)).contiguous(), right=True) - 1
            wanted_B = wanted_B.minimum(reach_B.clamp_min(0))
        return wanted_B


def grant(
    wanted_BL: Tensor, prices_K: Tensor, income: Tensor, real_BL: Tensor | None, account_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Spend from one token bucket a document: replace choices that it cannot pay by narrower ones.

    Args:
        wanted_BL: preferred choices.
        prices_K: prices of the choices, ascending.
        income: refill of a token.
        real_BL: False for padding, which neither refills nor spends; None: there is none.
        account_BK: the balance, then what is saved towards each wider choice.

    Returns:
        Choice indices (B, L), none wider than wanted, and the account (B, K) after the last token.
    """
    price_BL = prices_K.take(wanted_BL)
    beyond_BL = price_BL - income
    if real_BL is not None:
        price_BL, beyond_BL = price_BL * real_BL, beyond_BL * real_BL
    overdraft_BL = beyond_BL.cumsum(1) - account_BK[:, :1]
    forgone_BL = overdraft_BL.clamp_min(0).cummax(1).values
    paid_BL, steps = price_BL - since(forgone_BL), prices_K.diff()
    towards_BLK = (paid_BL[..., None] - prices_K[:-1]).clamp(torch.zeros_like(steps), steps)
    saved_BLK = towards_BLK.cumsum(1) + account_BK[:, None, 1:]
    bought_BLK = saved_BLK // steps
    left_B1 = forgone_BL[:, -1:] - overdraft_BL[:, -1:]
    return since(bought_BLK.sum(-1)), torch.cat((left_B1, saved_BLK[:, -1] - bought_BLK[:, -1] * steps), dim=1)


def since(running_BL: Tensor) -> Tensor:
    """Invert `cumsum(1)`: return what each token added to a running total that starts at 0."""
    return running_BL.diff(dim=1, prepend=running_BL.new_zeros(len(running_BL), 1))
