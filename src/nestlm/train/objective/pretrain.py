"""Plain language modelling: the teacher's own training, where no weights are given."""

from __future__ import annotations

from collections.abc import Iterator

from nestlm.data.batch import Batch
from nestlm.nn.loss import LossReader
from nestlm.train.objective.base import Objective, StageModels, Term


class PretrainObjective(Objective):
    """Cross-entropy of the whole model."""

    def terms(self, models: StageModels, batch: Batch, *, step: int) -> Iterator[Term]:
        read = LossReader(batch.targets_BL)
        loss = models.decoder(batch.tokens_BL, documents_BL=batch.documents_BL, read=read).read.loss
        yield Term(loss, {"loss": loss.detach()})
