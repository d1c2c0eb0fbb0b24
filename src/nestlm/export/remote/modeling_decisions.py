"""How each token decides how wide it runs, and how its sequence keeps within a budget.

Decisions look at the tokens before only. What a sequence has spent so far is kept beside its KV cache, so decoding
token by token decides as one pass over all tokens does. A document starts where a token sees none before it: there its
budget starts anew, so documents that share a row decide as each does alone.

Letters of shapes: B batch, L tokens, D model width, K choices of a site, J multipliers, R documents, n tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

PATIENCE = 32  # tokens of calibration text that a sequence's count starts with
START = 4.0  # of growths: softplus(-4) is small

Site = tuple[int, int]  # layer, and place in the order in which a layer decides


class Documents:
    """Where the documents of a batch lie; each gets a row of its own to decide in.

    Attributes:
        place_n: of each token of the batch, in the documents' rows.
        real_RL: False where a row holds padding, or nothing.
        row_R: the row of the batch that holds a document.
        begins_R: False for what continues the document of an earlier call.
        last_B: the last document of each row.
    """

    def __init__(self, mask: Tensor, start: int, *, batch: int, length: int) -> None:
        keys = torch.arange(mask.shape[-1], device=mask.device)
        offset = min(start, len(keys) - length)  # of this call's tokens among the keys
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
        """(B, L, ...) to the documents' rows, (R, L, ...), with zeros where these are longer than a document."""
        empty = each_BL.new_zeros(self.shape[0] * self.shape[1], *each_BL.shape[2:])
        return empty.index_copy(0, self.place_n.to(empty.device), each_BL.flatten(0, 1)).unflatten(0, self.shape)

    def gather(self, each_RL: Tensor, shape: torch.Size) -> Tensor:
        """Undo `spread`."""
        return each_RL.flatten(0, 1)[self.place_n.to(each_RL.device)].view(shape)


class Routing:
    """What the documents of one call have decided and spent: before it, and after, by site.

    A layer that runs twice (gradient checkpointing) reads the same and writes the same again.
    """

    def __init__(self) -> None:
        self.entered = False
        self.cache: Cache | None = None
        self.documents: Documents | None = None
        self.before: dict[Site, Tensor] = {}
        self.after: dict[Site, Tensor] = {}
        self.saved: dict[Site, Tensor] = {}  # by documents that decide once, in this call

    def enter(self, mask: Tensor | None, cache: Cache | None, *, batch: int, length: int) -> None:
        """Read the mask and what the cache's sequences have spent; the first layer of a call does.

        Raises:
            ValueError: a cache that holds other tokens than those that this model decided for.
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
        """What documents bring along to a site: what is kept of earlier calls, or an opening."""
        before = self.before.get(site)
        if before is None or self.documents is None:
            return opening if before is None else before
        begins_R = self.documents.begins_R.to(before.device).view(-1, *[1] * (before.ndim - 1))
        return torch.where(begins_R, opening, before[self.documents.row_R.to(before.device)])

    def leave(self) -> None:
        """Keep what the last document of each row has spent beside the KV cache."""
        if self.cache is None:
            return
        after = self.after
        if self.documents is not None:
            after = {site: kept[self.documents.last_B.to(kept.device)] for site, kept in after.items()}
        vars(self.cache).update(
            routing=(int(self.cache.get_seq_length()), after), reorder_cache=refuse, batch_select_indices=refuse
        )


def refuse(*_: Any, **__: Any) -> None:
    """Stand in for what would hand a cache's keys from row to row."""
    raise ValueError("rows of this model's KV cache cannot be reordered: what a sequence has spent stays with it")


class Chooser(nn.Module):
    """One site: scores of its choices for each token, and the ledger by which its budget is kept."""

    def __init__(self, router: dict, *, hidden_size: int, choices: int) -> None:
        super().__init__()
        self.kind, self.prompt_tokens, self.choices = router["kind"], router["prompt_tokens"], choices
        width, bounds, levels = router["hidden_width"], router["bounds"], router["levels"]
        self.input = nn.Parameter(torch.zeros(hidden_size, width))
        self.input_bias = nn.Parameter(torch.zeros(width))
        self.output = nn.Parameter(torch.zeros(width, choices))
        self.output_bias = nn.Parameter(torch.zeros(choices))
        # what the budget adds to the network, and how its scores are put on one scale with those of other sites
        self.budget = nn.Buffer(torch.zeros(width))
        self.scale = nn.Buffer(torch.zeros(choices))
        self.held = nn.Buffer(torch.zeros(choices))
        # cost of the choices in score at each multiplier, and under each bound in integers
        self.priced = nn.Buffer(torch.zeros(levels, choices))
        self.prices = nn.Buffer(torch.zeros(bounds, choices, dtype=torch.long))
        self.incomes = nn.Buffer(torch.zeros(bounds, dtype=torch.long))
        self.aims = nn.Buffer(torch.zeros(bounds, dtype=torch.long))
        self.demands = nn.Buffer(torch.zeros(bounds, levels, dtype=torch.long))

    def scores(self, hidden_BLD: Tensor) -> Tensor:
        """Of each choice, (B, L, K); higher is better."""
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
        """Choices of highest score less priced cost: (..., K) to (J, ...)."""
        return (scores - self.priced.to(scores.dtype).view(len(self.priced), *[1] * (scores.ndim - 1), -1)).argmax(-1)

    @torch.no_grad()
    def decide(self, hidden_BLD: Tensor, routing: Routing, site: Site) -> Tensor:
        """Choice indices (B, L); what later tokens need to know goes to the routing."""
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
        """What a document starts with."""
        if self.prompt_tokens:  # sums of scores (K), tokens seen, the decision or -1
            return F.pad(self.scale.new_zeros(rows, self.choices + 1, dtype=torch.float64), (0, 1), value=-1.0)
        each = torch.cat((torch.zeros_like(self.prices), PATIENCE * (self.demands - self.aims[:, None])), dim=1)
        return each.expand(rows, -1, -1)

    def draws_per_token(self, scores_BLK: Tensor, real_BL: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens want at the multiplier that their sequence could have afforded, or what its ledger allows."""
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
        """Whole for a sequence's first tokens; then what the mean of their scores wants and the sequence can pay."""
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
        """At most this site's income and what the sites that decided before it left of theirs."""
        for bound, (prices_K, income) in enumerate(zip(self.prices, self.incomes, strict=True)):
            left_B = income + sum(each[:, bound].to(income.device) for each in saved)
            reach_B = torch.searchsorted(prices_K, left_B.expand(len(wanted_B)).contiguous(), right=True) - 1
            wanted_B = wanted_B.minimum(reach_B.clamp_min(0))
        return wanted_B


def grant(
    wanted_BL: Tensor, prices_K: Tensor, income: Tensor, real_BL: Tensor | None, account_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Choices that sequences can pay, none wider than wanted, and what is left: balance, and savings for each step."""
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
    """What each token added to a running total that was 0 before the first."""
    return running_BL.diff(dim=1, prepend=running_BL.new_zeros(len(running_BL), 1))
