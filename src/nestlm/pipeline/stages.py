"""The stages of a run, in order. Each is a function of its context and leaves its result in its own folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors.torch import load_file

from nestlm.cost.table import PriceList
from nestlm.data.batch import Batch
from nestlm.data.datamodule import PackedTokens
from nestlm.data.manifest import SPLITS
from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.distributed import collectives
from nestlm.elastic.axes.base import search_space
from nestlm.elastic.ranking.base import order
from nestlm.elastic.surgery import sort_units
from nestlm.eval.latency_profile import profile as measure
from nestlm.eval.policy_scores import Scores, Spending, forward_seconds
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import fixed, full
from nestlm.pipeline.context import LATENCY_TABLE, MODEL, RECORD, ROUTER, SKIPPABLE, Context
from nestlm.pipeline.flops import flops_table
from nestlm.pipeline.tasks import elastic_task, joint_task, pretrain_task, router_task
from nestlm.router.base import RoutedPolicy, Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.router.static.uniform import UniformRouter
from nestlm.spec import Budget
from nestlm.train.callbacks.elastic_probe import Probe
from nestlm.train.objective.base import StageModels
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.utils.console import track
from nestlm.utils.json_files import write_json

Result = dict[str, Any]
PROBED_SEQUENCES = 16  # of calibration text
TIMED_ROWS = 4  # of the batch on which answers are timed


def profile(context: Context) -> Result:
    """Measure the table that prices time, or take the one that was named."""
    settings, cost = context.settings, context.settings.latency
    table = (
        measure(cost, space=settings.space(), config=settings.model.decoder_config(), device=context.device())
        if cost.table is None
        else cost.read()
    )
    write_json(context.folder / LATENCY_TABLE, table.to_json())
    check = None if table.check is None else table.check.model_dump()
    return {"unit": cost.unit, "device": table.device, "dtype": table.dtype, "check": check}


def prepare_data(context: Context) -> Result:
    """Tokenize the source into packed shards, or check those that it names."""
    settings = context.settings.data
    vocab_size, tokenizer_file = context.settings.model.decoder_config().vocab_size, context.settings.tokenizer_file
    prepared = settings.prepared
    if prepared is not None:
        prepared = prepared.with_model_tokens(
            vocab_size=vocab_size, tokenizer_file=tokenizer_file, special=settings.special
        )
        prepared.check(sequence_length=settings.sequence_length)
        prepared.copy_heldout(context.folder)
    else:
        prepare_source(
            settings.source,
            context.folder,
            vocab_size=vocab_size,
            tokenizer_file=tokenizer_file,
            heldout_share=settings.heldout_share,
            special=settings.special,
        )
        prepared = PreparedData.read(context.folder)
        prepared.check(sequence_length=settings.sequence_length)
    return {"fingerprint": prepared.fingerprint, "tokenizer": prepared.manifests[0].tokenizer_hash} | {
        f"{name}_tokens": prepared.split(name).tokens for name in SPLITS
    }


def pretrain(context: Context) -> Result:
    """Train the teacher, only because no weights were given; otherwise read them."""
    settings = context.settings
    decoder = context.decoder()
    if settings.model.weights is not None:
        settings.model.load_weights(decoder)
        result = {"steps": 0, "tokens": settings.model.pretraining_tokens}
    else:
        decoder.init_weights(seed=settings.seed)
        result = context.train("pretrain", pretrain_task(settings, decoder))
    context.save(decoder, MODEL)
    return result | readings(context, context.score(decoder, {"full": full})["full"])


def rank(context: Context) -> Result:
    """Sort the units of every site by importance, and name the blocks that may be skipped, where some may.

    The full model stays the same function.
    """
    settings = context.settings
    decoder = context.decoder("pretrain")
    unsorted = context.score(decoder, {"smallest_unsorted": fixed(settings.space().smallest())})
    device = context.device()
    scores = settings.ranking.scores(
        decoder.to(device), axes=settings.axis_list, batches=calibration_batches(context, device), seed=settings.seed
    )
    context.write({str(site): score for site, score in scores.items()}, "importance.safetensors")
    sort_units(decoder, {site: order(score) for site, score in scores.items()}, axes=settings.axis_list)
    context.save(decoder, MODEL)
    axes = tuple(axis.ranked(scores, num_layers=len(decoder.config.blocks)) for axis in settings.axis_list)
    space = search_space(axes, decoder.config)
    sliced = context.score(decoder, {"smallest_sliced": fixed(space.smallest())})
    used = min(settings.ranking.num_sequences, len(context.data(stream="calibration").rows("calibration")))
    result = {"sequences": used} | {name: score.loss for name, score in (unsorted | sliced).items()}
    return result | ({SKIPPABLE: [site.layer for site in space.block_sites]} if space.block_sites else {})


def calibration_batches(context: Context, device: torch.device) -> Iterator[Batch]:
    """Batches of calibration text for the ranking, under a bar."""
    wanted = context.settings.ranking.num_sequences
    data: PackedTokens = context.data(stream="calibration")
    loader = data.heldout_dataloader("calibration", num_rows=wanted)
    for batch in track(loader, "rank", total=len(loader)):
        yield move_data_to_device(batch, device)


def elastic(context: Context) -> Result:
    """Continue training so that every sub-network works."""
    decoder, space = context.decoder("rank"), context.settings.space()
    task = elastic_task(context.settings, decoder, teacher=context.teacher())
    result = context.train("elastic", task, callbacks=probes(context, decoder))
    context.save(decoder, MODEL)
    assert isinstance(task.objective, ElasticObjective), "it records what sub-networks lost"
    context.write(task.objective.record(), RECORD)
    scores = context.score(decoder, {"full": full, "smallest": fixed(space.smallest())})
    return result | {name: score.loss for name, score in scores.items()}


def probes(context: Context, decoder: Decoder) -> list[Probe]:
    """What looks at elastic training, where that is asked for: at sub-networks of the same level at every site."""
    settings = context.settings
    if not settings.elastic_probe_steps or not settings.elastic.steps:
        return []
    space, flops = settings.space(), flops_table(settings, per_token=False)
    top = max(space.max_choices - 1, 1)
    specs = [
        space.spec({site: round(level / top * (len(widths) - 1)) for site, widths in space.choices.items()})
        for level in range(top + 1)
    ]
    policies = {f"at_{flops.share(spec):.2f}": fixed(spec) for spec in specs}
    calibration = context.on_calibration_text(decoder, num_sequences=PROBED_SEQUENCES)
    return [Probe("elastic", calibration=calibration, policies=policies, every=settings.elastic_probe_steps)]


def train_router(context: Context) -> Result:
    """Train the router on its signal; the model stays as it is, and the signal's own network is thrown away."""
    settings, router = context.settings, context.router()
    decoder = context.decoder("elastic")
    objective = settings.make_signal(router)
    result: Result = {"steps": 0, "tokens": 0}
    if objective is not None:
        pairs = load_file(context.inputs["elastic"] / RECORD)  # a mapped file, in which tensors lie anywhere
        objective.warm_up(router, {name: value.clone() for name, value in pairs.items()})
        result = context.train("router", router_task(settings, decoder, router=router, signal=objective))
    calibration = context.calibration(decoder)
    ready(router, calibration)
    if objective is not None:
        models = StageModels(calibration.decoder, router=router)
        with calibration.precision():
            result |= objective.to(calibration.device).summary(models, list(calibration.batches))
    if router.state_dict():
        context.save(router, ROUTER)
    return result


def ready(router: Router, calibration: CalibrationData) -> None:
    """Have a router measure what all budgets need; all ranks then go by what rank 0 measured."""
    router.to(calibration.device).prepare(calibration)
    collectives.broadcast_module(router)


def joint(context: Context) -> Result:
    """Tune model and router together."""
    decoder, router = context.decoder("elastic"), context.router("router")
    task = joint_task(context.settings, decoder, teacher=context.teacher(), router=router)
    result = context.train("joint", task)
    context.save(decoder, MODEL)
    if task.steps:
        calibration = context.calibration(decoder)
        ready(router, calibration)
    if router.state_dict():
        context.save(router, ROUTER)
    return result


@dataclass(frozen=True)
class Found:
    """A router's answer to a budget, and where its score is filed."""

    router: str
    budget: Budget
    routed: RoutedPolicy
    prices: PriceList
    seconds: float
    name: str


def evaluate(context: Context) -> Result:
    """Find every router's policy for every budget, score it on the validation text, and count what it really spends."""
    settings = context.settings
    decoder, router = context.decoder("joint"), context.router("joint").eval()
    calibration = context.calibration(decoder)
    prices = settings.prices()
    routers = {"uniform": UniformRouter(prices=prices), settings.router.label: router.to(calibration.device)}
    found = [
        find(label, candidate, budget, calibration=calibration)
        for label, candidate in routers.items()
        for budget in settings.budgets
    ]
    seconds = forward_seconds(calibration, [full, *(item.routed.policy for item in found)], num_rows=TIMED_ROWS)
    scores = context.score(
        decoder,
        {"full": full} | {item.name: item.routed.policy for item in found},
        prices={"full": prices} | {item.name: item.prices for item in found},
    )
    return {
        "rows": [row(context, item, scores[item.name], whole=scores["full"], prices=prices) for item in found],
        "specs": [choice(item, scores[item.name]) for item in found],
        "full_spec": prices.space.full().widths_by_axis(),
        "layers": {axis: [site.layer for site in sites] for axis, sites in prices.space.axes.items()},
        "find_seconds": [item.seconds for item in found],
        "full_seconds": seconds[0],
        "forward_seconds": seconds[1:],
    }


def find(label: str, router: Router, budget: Budget, *, calibration: CalibrationData) -> Found:
    """Ask a router for a budget. Answers that are the same sub-network share a score."""
    started = time.perf_counter()
    answer = router.find(budget, calibration=calibration)
    seconds = time.perf_counter() - started
    if answer.spec is None:
        name = f"{label}-{budget}"
    elif answer.spec == router.prices.space.full():
        name = "full"
    else:
        name = "subnet-" + "-".join(map(str, router.prices.space.indices(answer.spec)))
    return Found(label, budget, answer, router.prices, seconds, name)


def row(context: Context, item: Found, scores: Scores, *, whole: Scores, prices: PriceList) -> dict[str, Any]:
    """A line of results.csv. What a dynamic router stores is the whole model, whatever it uses."""
    main, spec = prices.main, item.routed.spec
    stored = prices.space.full() if spec is None else spec
    spent = scores.spending[main.name] if spec is None else Spending(main.share(spec), 0.0, main.share(spec))
    sizes = {name: prices.tables[name].cost(stored) for name in context.settings.costs}
    if spec is None:
        sizes |= {
            name: scores.spending[name].mean * prices.tables[name].whole for name in scores.spending if name in sizes
        }
    return {
        "router": item.router,
        "budget": str(item.budget),
        "achieved": spent.mean,
        "spread": spent.spread,
        "worst": spent.worst,
        "cost": main.name,
        "achieved_cost": spent.mean * main.whole if spec is None else main.cost(spec),
        **sizes,
        **readings(context, scores),
        "loss_vs_full": scores.loss - whole.loss,
        "seed": context.settings.seed,
    }


def choice(item: Found, scores: Scores) -> dict[str, Any]:
    """What is kept of an answer: widths (of a dynamic router their means), and the plan by which a budget is kept."""
    if item.routed.spec is not None:
        return {"widths": item.routed.spec.widths_by_axis()}
    return {"widths": dict(scores.widths), "plan": item.routed.plan}


def readings(context: Context, scores: Scores) -> dict[str, float]:
    """A score in all the units that people read it in."""
    split = PreparedData.read(context.inputs["data"]).split("validation")
    return {
        "val_loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(tokens=split.tokens, num_bytes=split.bytes),
        "accuracy": scores.accuracy,
    }
