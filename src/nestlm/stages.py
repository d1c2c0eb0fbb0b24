"""The stages of a run, in order. Each is a function of its context and leaves its result in its own folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors.torch import save_file
from torch import nn

from nestlm.context import MODEL, PAIRS, ROUTER, Context
from nestlm.data.batch import Batch
from nestlm.data.module import PackedTokens
from nestlm.data.packed import PackedRows
from nestlm.data.prepare import SPLITS, Manifest, prepare
from nestlm.elastic.weights import sort_units
from nestlm.evaluation import Scores
from nestlm.nn.policy import fixed, full
from nestlm.objective.base import Parts
from nestlm.objective.elastic import Elastic
from nestlm.objective.joint import Joint
from nestlm.objective.pretrain import Pretrain
from nestlm.progress import track
from nestlm.ranking.base import order
from nestlm.router.uniform import UniformRouter
from nestlm.spec import Budget, SubnetSpec

Result = dict[str, Any]


def prepare_data(context: Context) -> Result:
    """Tokenize the source into packed shards."""
    settings = context.settings.data
    manifest = prepare(
        settings.source,
        context.folder,
        vocab_size=context.settings.model.decoder_config().vocab_size,
        tokenizer_file=context.settings.tokenizer_file,
        heldout_share=settings.heldout_share,
    )
    for split in SPLITS:  # too little text is found now, not when the split is first read
        PackedRows(context.folder, split, sequence_length=settings.sequence_length)
    return {"fingerprint": manifest.fingerprint, "tokenizer": manifest.tokenizer_hash} | {
        f"{name}_tokens": split.tokens for name, split in manifest.splits.items()
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
        result = context.train(
            "pretrain",
            Parts(decoder),
            objective=Pretrain(),
            trained={"decoder": (decoder, settings.pretrain.lr)},
            steps=settings.pretrain.steps,
        )
    context.save(decoder, MODEL)
    loss = context.score(decoder, {"full": full})["full"]
    return result | readings(context, Scores(**loss))


def rank(context: Context) -> Result:
    """Sort the units of every site by importance; the full model stays the same function."""
    settings = context.settings
    decoder, smallest = context.decoder("pretrain"), settings.space().smallest()
    unsorted = context.score(decoder, {"smallest_unsorted": fixed(smallest)})
    device = context.device()
    scores = settings.ranking.scores(
        decoder.to(device), axes=settings.axis_list, batches=calibration(context, device), seed=settings.seed
    )
    save_file({str(site): score for site, score in scores.items()}, context.folder / "importance.safetensors")
    sort_units(decoder, {site: order(score) for site, score in scores.items()}, axes=settings.axis_list)
    context.save(decoder, MODEL)
    sliced = context.score(decoder, {"smallest_sliced": fixed(smallest)})
    used = min(settings.ranking.num_sequences, len(context.data(stream="calibration").rows("calibration")))
    return {"sequences": used} | {name: score["loss"] for name, score in (unsorted | sliced).items()}


def calibration(context: Context, device: torch.device) -> Iterator[Batch]:
    """Batches of calibration text for the ranking, under a bar."""
    wanted = context.settings.ranking.num_sequences
    data: PackedTokens = context.data(stream="calibration")
    loader = data.heldout_dataloader("calibration", num_rows=wanted)
    for batch in track(loader, "rank", total=len(loader)):
        yield move_data_to_device(batch, device)


def elastic(context: Context) -> Result:
    """Continue training so that every sub-network works."""
    settings = context.settings
    decoder, space = context.decoder("rank"), settings.space()
    teacher = context.decoder("pretrain") if settings.teacher.needs_teacher else None
    objective = Elastic(space, sampler=settings.sampler, teaching=settings.teacher, seed=settings.seed)
    result = context.train(
        "elastic",
        Parts(decoder, teacher),
        objective=objective,
        trained={"decoder": (decoder, settings.elastic.lr)},
        steps=settings.elastic.steps,
    )
    context.save(decoder, MODEL)
    save_file(objective.pairs(), context.folder / PAIRS)
    scores = context.score(decoder, {"full": full, "smallest": fixed(space.smallest())})
    return result | {name: score["loss"] for name, score in scores.items()}


def train_router(context: Context) -> Result:
    """Train the router on its signal; the model stays as it is, and the signal's own network is thrown away."""
    settings, router = context.settings, context.router()
    if settings.router.signal is None:
        return {"steps": 0, "tokens": 0}
    objective = settings.router.signal(table=router.prices.main)
    result = context.train(
        "router",
        Parts(context.decoder("elastic"), router=router),
        objective=objective,
        trained={"router": (router, settings.router.lr), "signal": (objective, objective.lr)},
        steps=settings.router.steps,
    )
    context.save(router, ROUTER)
    return result | objective.summary()


def joint(context: Context) -> Result:
    """Tune model and router together."""
    settings = context.settings
    decoder, router = context.decoder("elastic"), context.router("router")
    teacher = context.decoder("pretrain") if settings.teacher.needs_teacher else None
    trained: dict[str, tuple[nn.Module, float]] = {"decoder": (decoder, settings.joint.lr)}
    if list(router.parameters()):
        trained["router"] = (router, settings.router.joint_lr)
    objective = Joint(
        settings.teacher,
        budgets_per_step=settings.joint.budgets_per_step,
        cost_weight=settings.joint.cost_weight,
        dead_zone=settings.joint.dead_zone,
        seed=settings.seed,
    )
    result = context.train(
        "joint", Parts(decoder, teacher, router), objective=objective, trained=trained, steps=settings.joint.steps
    )
    context.save(decoder, MODEL)
    context.save(router, ROUTER)
    return result


def evaluate(context: Context) -> Result:
    """Find every router's sub-network for every budget, and score it on the validation text."""
    settings = context.settings
    decoder, router = context.decoder("joint"), context.router("joint").eval()
    routers = {"uniform": UniformRouter(prices=router.prices)} | {settings.router.label: router}
    tables, main, whole = router.prices.tables, router.prices.main, router.prices.space.full()
    names: dict[SubnetSpec, str] = {whole: "full"}
    found: list[tuple[str, Budget, SubnetSpec, float]] = []
    for label, candidate in routers.items():
        for budget in settings.budgets:
            started = time.perf_counter()
            spec = candidate.spec(budget)
            names.setdefault(spec, f"subnet{len(names)}")
            found.append((label, budget, spec, time.perf_counter() - started))
    scores = context.score(decoder, {name: fixed(spec) for spec, name in names.items()})
    rows = [
        {
            "router": label,
            "budget": str(budget),
            "achieved": main.share(spec),
            "cost": main.name,
            "achieved_cost": main.cost(spec),
            **{name: tables[name].cost(spec) for name in settings.costs},
            **readings(context, Scores(**scores[names[spec]])),
            "loss_vs_full": scores[names[spec]]["loss"] - scores["full"]["loss"],
            "seed": settings.seed,
        }
        for label, budget, spec, _ in found
    ]
    return {
        "rows": rows,
        "specs": [spec.by_axis() for _, _, spec, _ in found],
        "full_spec": whole.by_axis(),
        "find_seconds": [seconds for _, _, _, seconds in found],
    }


def readings(context: Context, scores: Scores) -> dict[str, float]:
    """A score in all the units that people read it in."""
    split = Manifest.read(context.inputs["data"]).splits["validation"]
    return {
        "val_loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(tokens=split.tokens, num_bytes=split.bytes),
        "accuracy": scores.accuracy,
    }
