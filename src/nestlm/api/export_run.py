"""Export a sub-network, or a routed model, of a finished run, checked on its validation text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nestlm.cost.table import PriceList
from nestlm.data.manifest import TOKENIZER
from nestlm.data.prepared_data import PreparedData
from nestlm.errors import CheckpointError, ExportError
from nestlm.eval.policy_scores import spent_shares
from nestlm.export import exporter
from nestlm.export.export_check import ExportCheck
from nestlm.export.gguf_file import Precision
from nestlm.export.model_card import CardFacts
from nestlm.model.family import Family
from nestlm.model.parent_files import ParentFiles
from nestlm.model.weights_io import CURE
from nestlm.nn.decoder import Decoder
from nestlm.pipeline.runtime import StageRuntime
from nestlm.pipeline.stages.evaluate import EvaluateStage
from nestlm.pipeline.stages.pretrain import PretrainStage
from nestlm.report.run_folder import PARENT, read_result
from nestlm.report.tables import read_csv
from nestlm.router.base import RoutedPolicy, Router
from nestlm.router.protocols import PlanningRouter, narrow
from nestlm.spec import Budget

TEXT_ROWS, TEXT_TOKENS = 4, 256  # of validation text, on which an export is compared
FORMATS = ("hf", "gguf")
PRECISIONS = (*exporter.DTYPES, "q8_0")


@dataclass(frozen=True)
class LoadedRun:
    """What an export reads from a finished run.

    Attributes:
        stage: the last stage, which has the settings of evaluation.
        runtime: folders of the run and its stages.
        decoder: the whole model, on the CPU, in evaluation mode.
        router: the router that the run trained.
        prices: prices of sub-networks.
        provenance: content of provenance.json.
    """

    stage: EvaluateStage
    runtime: StageRuntime
    decoder: Decoder
    router: Router
    prices: PriceList
    provenance: dict[str, Any]

    @property
    def family(self) -> Family:
        """The model family and its sizes."""
        return self.stage.model


@dataclass(frozen=True)
class Request:
    """Target folder and format of an export.

    Attributes:
        out: a folder that does not exist yet, or is empty; it appears whole or not at all.
        form: `hf` or `gguf`.
        precision: dtype of the weights: `f32`, `f16`, `bf16`, or for GGUF `q8_0`; None: that of the parent's weights.
        push_to: OWNER/NAME on the Hugging Face hub, to upload the folder to; None: no upload.
    """

    out: Path
    form: str
    precision: str | None
    push_to: str | None

    def check(self, family: Family, *, run: Path) -> None:
        """Raise ExportError, before anything is computed, for an unknown format or dtype, or a bad target."""
        for name, value, known in (("format", self.form, FORMATS), ("dtype", self.precision, (None, *PRECISIONS))):
            if value not in known:
                wanted = ", ".join(filter(None, known))
                raise ExportError(f"export: --{name} got {value!r}, wanted one of {wanted}")
        exporter.check_target(family, self.out, run=run, form=self.form, push_to=self.push_to)


def export(
    run: LoadedRun, routed: RoutedPolicy, request: Request, *, budget: Budget, router: str, achieved: float | None
) -> ExportCheck:
    """Write a stand-alone model, and check that its outputs are those of the nested model.

    Args:
        run: the finished run with the nested model.
        routed: the sub-network, or the per-token policy, to export.
        request: target folder and format, after `Request.check`.
        budget: the budget for which `routed` was found.
        router: label of the router that found it.
        achieved: its cost as a share of the whole model's; None: not measured.

    Raises:
        ExportError: the format cannot hold the model, the folder cannot be written, or the outputs differ.
    """
    loader = run.stage.packed_tokens(run.runtime, stream="validation").heldout_dataloader(
        "validation", num_rows=TEXT_ROWS
    )
    text_BL = torch.cat([batch.tokens_BL for batch in loader])[:, :TEXT_TOKENS]
    kept = kept_parent(run)
    nested = exporter.ExportSource(
        decoder=run.decoder,
        family=run.family,
        parent=kept,
        axes=run.stage.axis_list,
        tokenizer=run.runtime.inputs["data"] / TOKENIZER,
        special_tokens=PreparedData.read(run.runtime.inputs["data"]).special_tokens,
        text_BL=text_BL,
    )
    facts = CardFacts(
        budget=str(budget),
        achieved=costs(run, routed, achieved=achieved, text_BL=text_BL),
        router=router,
        parent=parent_name(run.family, kept),
        fingerprint=run.provenance["data_fingerprint"],
        commit=run.provenance["commit"],
        losses=losses(run, budget=budget, router=router),
    )
    return exporter.export_model(
        nested,
        chosen(run, budget, routed),
        request.out,
        form=cast(exporter.Format, request.form),
        precision=cast(Precision | None, request.precision),
        facts=facts,
        push_to=request.push_to,
    )


def chosen(run: LoadedRun, budget: Budget, routed: RoutedPolicy) -> exporter.ExportChoice:
    """Convert a policy to what exporters take: a sub-network, or a router with its plan."""
    if routed.spec is not None:
        return exporter.ExportChoice(spec=routed.spec)
    assert routed.plan is not None, "tokens differ by a plan"
    router = narrow(run.router, PlanningRouter)
    return exporter.ExportChoice(routed=(router, router.read_plan(budget, routed.plan)))


def kept_parent(run: LoadedRun) -> ParentFiles | None:
    """Return the files, such as the tokenizer's, that the run copied from the checkpoint it started from.

    None if the run trained from scratch.

    Raises:
        CheckpointError: the copies are missing.
    """
    if run.family.weights is None:
        return None
    folder = run.runtime.folder / "checkpoints" / PARENT
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; {CURE}")
    return ParentFiles.read(folder)


def parent_name(family: Family, kept: ParentFiles | None) -> str:
    """Return the name of the parent model: its repository on the hub, or the name of its folder."""
    if kept is None:
        return f"a {family.architecture} trained from scratch"
    return kept.repository or Path(str(family.weights)).name or "a local checkpoint"


def losses(run: LoadedRun, *, budget: Budget, router: str) -> dict[str, float]:
    """Return the losses on the validation text that the run measured, by a description of the model."""
    rows = read_csv(run.runtime.folder / "results.csv")
    found = {
        "the parent, before it was nested": read_result(run.runtime.folder, PretrainStage).val_loss,
        "the whole nested model": rows[0]["val_loss"] - rows[0]["loss_vs_full"],
    }
    for row in rows:
        if (row["router"], str(row["budget"])) == (router, str(budget)):
            found["this sub-network"] = row["val_loss"]
    return found


@torch.no_grad()
def costs(
    run: LoadedRun, routed: RoutedPolicy, *, achieved: float | None, text_BL: Tensor
) -> dict[str, tuple[str, float]]:
    """Return the cost of a policy by name of the cost: the amount with its unit, and its share of the whole model's.

    A sub-network is priced under every cost of the run, a per-token policy only under the main one.

    Args:
        run: the finished run.
        routed: the sub-network, or the per-token policy.
        achieved: mean share of a per-token policy; None: it is measured on `text_BL`.
        text_BL: tokens of held-out text.
    """
    spec = routed.spec
    if spec is not None:
        tables = run.prices.tables.items()
        return {name: (f"{table.cost(spec):,.4g} {table.unit}", table.share(spec)) for name, table in tables}
    table = run.router.prices.main
    if achieved is None:
        decided = (run.decoder(row_1L, routed.policy).decisions for row_1L in text_BL.split(1))
        achieved = float(torch.cat([spent_shares(each, table, batch_size=1) for each in decided]).mean())
    return {table.name: (f"{achieved * table.whole:,.4g} {table.unit}", achieved)}
