"""Measure a latency table: time whole decoders at designed widths, then fit the prices that add up to those times.

Blocks that are timed one by one mispredict the decoder that holds them (caches, launches), so all times are end to end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestlm.cost.latency.fit import Array, fit_prices, mean_error, predict
from nestlm.cost.latency.latency import Latency
from nestlm.cost.latency.table_file import FitErrors, LatencyTable, Prices, RouterTime
from nestlm.cost.table import Rows
from nestlm.nn.config import DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import FULL, Decision, Policy, Stream, Width, constant
from nestlm.router.dynamic.base import features
from nestlm.router.dynamic.pacing import DEMAND_LEVELS, Pace, PacedSite
from nestlm.router.dynamic.token_bucket import TokenBucket
from nestlm.router.networks import SiteNetworks
from nestlm.spec import SearchSpace, Site
from nestlm.utils.console import track
from nestlm.utils.devices import device_name, synchronize
from nestlm.utils.malloc import keep_freed_blocks

WARM_UP = 2  # passes of each run that are not counted
RANDOM_RUNS = 24  # beside those that change one axis at a time
ALONE_RUNS = 6  # in which only one axis decides
STRAY_SHARE = 0.1  # of the tokens of a mix that takes one choice otherwise
CHECKED_SPECS, CHECKED_MIXES = 20, 10  # that the fit does not see
ROUTER_WIDTHS = (32, 128)
SKIPPED = -1

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Bench:
    """A decoder with random weights, its input, and a cache where single tokens are decoded."""

    decoder: Decoder
    tokens_BL: Tensor
    cache: KVCache | None

    @classmethod
    def make(cls, cost: Latency, *, config: DecoderConfig, device: torch.device) -> Bench:
        """Allocate the decoder, random tokens, and for decoding a KV cache with room for one more token.

        Args:
            cost: gives dtype, phase, batch size and context length.
            config: sizes of the decoder.
            device: where everything is allocated.
        """
        dtype = getattr(torch, cost.dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.device("meta"):
            decoder = Decoder(config)
        decoder = decoder.to(dtype).to_empty(device=device)
        for parameter in decoder.parameters():
            parameter.normal_(std=config.hidden_size**-0.5, generator=generator)
        decode = cost.phase == "decode"
        shape = (cost.batch_size, 1 if decode else cost.context_length)
        tokens_BL = torch.randint(config.vocab_size, shape, generator=generator, device=device)
        cache = None
        if decode:
            cache = KVCache(config, batch_size=cost.batch_size, length=cost.context_length, device=device, dtype=dtype)
            for tensor in (tensor for layer in cache.layers for tensor in layer):
                tensor.normal_(generator=generator)
            cache.num_tokens = cost.context_length - 1
        return cls(decoder, tokens_BL, cache)

    def run(self, policy: Policy) -> None:
        """Run one forward pass, then set the cache back to the length that it had before."""
        self.decoder(self.tokens_BL, policy, cache=self.cache)
        if self.cache is not None:
            self.cache.num_tokens -= 1

    def times(self, policies: Sequence[Policy], *, repeats: int, what: str) -> Array:
        """Time the forward pass of each policy; return medians over repeats, in milliseconds.

        Each repeat runs all policies, one after another, so that a drift of the clock rate affects all of them.

        Args:
            policies: the policies.
            repeats: timed passes of each policy, after `WARM_UP` passes.
            what: label of the progress bar.
        """
        device = self.tokens_BL.device
        found: list[list[float]] = [[] for _ in policies]
        for repeat in track(range(WARM_UP + repeats), what, total=WARM_UP + repeats):
            for policy, times in zip(policies, found, strict=True):
                synchronize(device)
                started = time.perf_counter()
                self.run(policy)
                synchronize(device)
                if repeat >= WARM_UP:
                    times.append(1e3 * (time.perf_counter() - started))
        return np.array([statistics.median(times) for times in found])


@torch.inference_mode()
def profile(cost: Latency, *, space: SearchSpace, config: DecoderConfig, device: torch.device) -> LatencyTable:
    """Measure the latency table of a decoder: the price of each choice, in milliseconds.

    Args:
        cost: gives phase, dtype, batch size, context length and repeats.
        space: the choices.
        config: sizes of the whole decoder.
        device: where the decoder is timed.
    """
    keep_freed_blocks(device)  # as where the model trains and serves
    bench = Bench.make(cost, config=config, device=device)
    alike = [group_of(site, config=config, space=space) for site in space.sites]
    base, rows, mape = measure_specs(bench, space=space, alike=alike, repeats=cost.repeats)
    per_token, mixes_mape = measure_mixes(bench, (base, rows), space=space, alike=alike, repeats=cost.repeats)
    return LatencyTable.model_validate(
        {
            "format": 1,
            "unit": "ms",
            "phase": cost.phase,
            "device": device_name(device),
            "dtype": cost.dtype,
            "batch_size": cost.batch_size,
            "context_length": cost.context_length,
            "versions": {name: version(name) for name in ("torch", "nestlm")},
            "constant": base,
            "prices": Prices.of(space, rows),
            "per_token": per_token,
            "check": FitErrors(specs=CHECKED_SPECS, mape=mape, mixes=CHECKED_MIXES, mixes_mape=mixes_mape),
        }
    )


def measure_specs(bench: Bench, *, space: SearchSpace, alike: list[int], repeats: int) -> tuple[float, Rows, float]:
    """Measure the table for specs that all tokens share.

    Args:
        bench: the decoder.
        space: the choices.
        alike: group of each site; sites of one group get the same prices.
        repeats: timed passes of each run.

    Returns:
        The constant, the prices of each site's choices, and the mean error on random specs that the fit does not see.
    """
    designs = spec_designs(space)
    checked = random_specs(space, count=CHECKED_SPECS, generator=np.random.default_rng(1))
    runs = np.concatenate([designs, checked])
    times = bench.times([spec_policy(space, run) for run in runs], repeats=repeats, what="profile")
    reach = np.stack([reached(run[:, None], space) for run in runs])
    base, rows = fit_prices(reach[: len(designs)], times[: len(designs)], space=space, alike=alike)
    predicted = predict(reach[len(designs) :], constant=base, rows=rows)
    return base, rows, mean_error(predicted, times[len(designs) :])


def measure_mixes(
    bench: Bench, static: tuple[float, Rows], *, space: SearchSpace, alike: list[int], repeats: int
) -> tuple[dict[str, object], float]:
    """Measure the part of the table for choices per token.

    In some runs only one axis decides. The time of the other sites is known from the static table and is subtracted;
    the rest is the time of the sites that decide.

    Args:
        bench: the decoder.
        static: constant and prices that `measure_specs` returned.
        space: the choices.
        alike: group of each site; sites of one group get the same prices.
        repeats: timed passes of each run.

    Returns:
        The field `per_token` of the table, and the mean error on random mixes that the fit does not see.
    """
    tokens, device = bench.tokens_BL.numel(), bench.tokens_BL.device
    designs = mix_designs(space, tokens)
    checked = [
        Mix.all(run) for run in random_mixes(space, tokens, count=CHECKED_MIXES, generator=np.random.default_rng(1))
    ]
    runs = [*designs, *checked]
    policies = [run.policy(space, shape=bench.tokens_BL.shape, device=device) for run in runs]
    asking = [routed(policies[-1], space=space, bench=bench, hidden_width=width) for width in ROUTER_WIDTHS]
    times = bench.times([*policies, *asking], repeats=repeats, what="profile")
    base, fixed = static
    known = np.array([base + run.fixed_price(fixed, space) for run in runs])
    reach = np.stack([run.reach(space) for run in runs])
    fitted, held_out = slice(len(designs)), slice(len(designs), len(runs))
    _, rows = fit_prices(reach[fitted], times[fitted], space=space, alike=alike, known=known[fitted])
    predicted = known[held_out] + predict(reach[held_out], constant=0.0, rows=rows)
    router = router_time(*times[len(runs) - 1 :].tolist())
    return {"prices": Prices.of(space, rows), "router": router}, mean_error(predicted, times[held_out])


@dataclass(frozen=True)
class Mix:
    """A run in which tokens differ at some sites.

    Attributes:
        indices: index of the choice, (sites, tokens); at a site that does not decide, all tokens have the same.
        decides: for each site, whether it decides for each token.
    """

    indices: Indices
    decides: tuple[bool, ...]

    @classmethod
    def all(cls, indices: Indices) -> Mix:
        """Make a mix in which every site decides."""
        return cls(indices, (True,) * len(indices))

    def policy(self, space: SearchSpace, *, shape: torch.Size, device: torch.device) -> Policy:
        """Return the policy that gives each token of a batch of this shape its choices."""
        decisions = {}
        for (site, widths), index, decides in zip(space.choices.items(), self.indices, self.decides, strict=True):
            drawn = torch.from_numpy(index).view(shape).to(device)
            decisions[site] = Decision(Width.per_row(widths, drawn) if decides else Width(widths[int(index[0])]))
        return constant(decisions)

    def reach(self, space: SearchSpace) -> Array:
        """Compute `reached` of the mix, with 0 at sites that do not decide."""
        return reached(self.indices, space) * np.array(self.decides, dtype=float)[:, None]

    def fixed_price(self, rows: Rows, space: SearchSpace) -> float:
        """Predict the time of the sites that do not decide, in milliseconds.

        Each such site takes the static price of its choice, times the share of tokens that run its block.

        Args:
            rows: static prices of each site's choices, in the order of the space.
            space: the choices.
        """
        sites = zip(rows, self.indices, self.decides, running(self.indices, space).mean(1), strict=True)
        return sum(share * row[int(index[0])] for row, index, decides, share in sites if not decides)


def router_time(without: float, narrow: float, wide: float) -> RouterTime:
    """Fit the time of a router as a constant plus a price for each unit of the hidden width, neither below 0.

    Args:
        without: time of a pass without a router, in milliseconds.
        narrow: time with networks of the first of `ROUTER_WIDTHS`.
        wide: time with networks of the second.
    """
    low, high = ROUTER_WIDTHS
    per_unit = max(0.0, (wide - narrow) / (high - low))
    return RouterTime(constant=max(0.0, narrow - low * per_unit - without), per_unit=per_unit)


# designs: arrays of choice indices; a spec is (sites,), a mix (sites, tokens)


def spec_designs(space: SearchSpace) -> Indices:
    """Choose the specs from whose times the prices are fitted, (count, sites).

    They are: everything skipped, each choice of one axis with the other axes skipped or full, and random specs.
    """
    runs = [lowest(space)[None], one_axis_at_a_time(space, narrowest=SKIPPED)]
    return np.concatenate([*runs, random_specs(space, count=RANDOM_RUNS, generator=np.random.default_rng(0))])


def mix_designs(space: SearchSpace, tokens: int) -> list[Mix]:
    """Choose the mixes from whose times the prices per token are fitted.

    They are: most tokens at one choice of one axis with the other axes narrowest or full, random mixes, and random
    mixes in which only one axis decides. In the first kind a tenth of the tokens choose at random, since a site at
    which all tokens agree needs fewer matrix products than a real mix.
    """
    generator = np.random.default_rng(0)
    alike = one_axis_at_a_time(space, narrowest=0)[:, :, None]
    stray = random_mixes(space, tokens, count=len(alike), generator=generator)
    nearly_alike = np.where(generator.uniform(size=stray.shape) < STRAY_SHARE, stray, alike)
    drawn = random_mixes(space, tokens, count=RANDOM_RUNS, generator=generator)
    runs = [Mix.all(run) for run in (*nearly_alike, *drawn)]
    for axis in space.axes if len(space.axes) > 1 else ():
        decides = tuple(site.axis == axis for site in space.sites)
        for run in random_mixes(space, tokens, count=ALONE_RUNS, generator=generator):
            runs.append(Mix(np.where(np.array(decides)[:, None], run, run[:, :1]), decides))
    return runs


def lowest(space: SearchSpace) -> Indices:
    """Return the indices (sites,) at which nothing runs: the index of width 0 where it is a choice, else `SKIPPED`."""
    return np.array([SKIPPED if widths[0] else 0 for widths in space.choices.values()])


def one_axis_at_a_time(space: SearchSpace, *, narrowest: int) -> Indices:
    """List each choice of each axis, the same in all layers; the other axes are once at `narrowest`, once full.

    Args:
        space: the choices.
        narrowest: index that stands for the narrowest: 0, or `SKIPPED`.

    Returns:
        Indices, (count, sites).
    """
    full = np.array([len(widths) - 1 for widths in space.choices.values()])
    runs = []
    for axis in space.axes:
        chosen = np.array([site.axis == axis for site in space.sites])
        for others in (np.maximum(narrowest, lowest(space)), full):
            for choice in range(int(full[chosen].max()) + 1):
                runs.append(np.where(chosen, np.minimum(choice, full), others))
    return np.stack(runs)


def random_specs(space: SearchSpace, *, count: int, generator: np.random.Generator) -> Indices:
    """Draw heterogeneous specs from near the smallest to near the full model, (count, sites)."""
    return random_mixes(space, 1, count=count, generator=generator)[:, :, 0]


def random_mixes(space: SearchSpace, tokens: int, *, count: int, generator: np.random.Generator) -> Indices:
    """Draw mixes whose sites have distributions of their own, from narrow to wide, (count, sites, tokens)."""
    full = np.array([len(widths) - 1 for widths in space.choices.values()])
    level = (generator.uniform(size=(count, 1)) + generator.uniform(size=(count, len(full)))) / 2
    return generator.binomial(full[:, None], level[:, :, None], size=(count, len(full), tokens))


def reached(indices: Indices, space: SearchSpace) -> Array:
    """Return the share of the tokens that take each choice or a wider one: (sites, tokens) to (sites, max choices).

    Tokens that skip a block reach nothing in it.
    """
    return ((indices[:, :, None] >= np.arange(space.max_choices)) & running(indices, space)[:, :, None]).mean(1)


def running(indices: Indices, space: SearchSpace) -> NDArray[np.bool_]:
    """Return whether each token runs the block of each site, (sites, tokens)."""
    rows = {site: row for row, site in enumerate(space.sites)}
    runs = np.ones(indices.shape, dtype=bool)
    for site, block_site in space.enclosing.items():
        runs[rows[site]] = indices[rows[block_site]] != 0
    return runs


def group_of(site: Site, *, config: DecoderConfig, space: SearchSpace) -> int:
    """Return a number that is the same for sites of the same axis in blocks of the same sizes."""
    return next(
        number
        for number, other in enumerate(space.sites)
        if other.axis == site.axis and config.blocks[other.layer] == config.blocks[site.layer]
    )


# policies


def spec_policy(space: SearchSpace, indices: Indices) -> Policy:
    """Make the policy that runs a spec, given as indices (sites,); `SKIPPED` skips a site."""
    return constant(
        {
            site: Decision(Width(0 if index == SKIPPED else widths[index]))
            for (site, widths), index in zip(space.choices.items(), indices.tolist(), strict=True)
        }
    )


def routed(policy: Policy, *, space: SearchSpace, bench: Bench, hidden_width: int) -> Policy:
    """Add the work of a dynamic router to a policy, to time it: a network, a pace and a token bucket at each site.

    Args:
        policy: the policy whose decisions are used; those of the router are discarded.
        space: the choices.
        bench: gives the decoder's hidden size, device and dtype.
        hidden_width: hidden units of the networks.
    """
    weight = bench.decoder.embed.weight
    networks = SiteNetworks(space, num_inputs=bench.decoder.config.hidden_size, hidden_width=hidden_width, init_std=0.1)
    networks.init_weights(seed=0)
    networks.to(weight)
    rows = {site: row for row, site in enumerate(space.sites)}
    paced = []
    for widths in space.choices.values():
        bucket = TokenBucket(torch.arange(1, len(widths) + 1, device=weight.device), refill_rate=len(widths))
        priced_JK = torch.linspace(0.0, 1.0, len(DEMAND_LEVELS), dtype=torch.float64, device=weight.device)[:, None]
        demands = (torch.zeros(len(DEMAND_LEVELS), dtype=torch.long, device=weight.device),)
        paced.append(PacedSite(Pace(priced_JK * bucket.prices, demands), (bucket,), target_ratio=1.0))

    def decide(site: Site, hidden_BLD: Tensor, stream: Stream) -> Decision:
        row = rows.get(site)
        if row is None:
            return FULL
        paced[row].decide(networks.at(row, features(hidden_BLD)), real_BL=None, kept=None)
        return policy(site, hidden_BLD, stream)

    return decide
