"""The objective of pretraining the parent model, where no weights are given: language modelling."""

from __future__ import annotations

from collections.abc import Iterator

from typing_extensions import override

from nestlm.data.batch import Batch
from nestlm.nn.loss import LossFn
from nestlm.train.objective.base import Objective, StageModels, Term


class PretrainObjective(Objective):
    """Cross-entropy of the whole model on the text."""

    @override
    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        output_fn = LossFn(batch.targets_BL)
        loss = models.decoder(batch.tokens_BL, documents_BL=batch.documents_BL, output_fn=output_fn).output.loss
        yield Term(loss, {"loss": loss.detach()})
