"""Stage `elastic`: continue training so that every sub-network works."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from nestlm.elastic.sampler.base import Sampler
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import fixed, full
from nestlm.pipeline.flops import flops_table, sampled_passes
from nestlm.pipeline.runtime import MODEL, RECORD, StageRuntime
from nestlm.pipeline.settings import SpaceSettings
from nestlm.pipeline.stages.training import TrainingResult, TrainingStage
from nestlm.train.callbacks.elastic_probe import Probe
from nestlm.train.objective.base import StageModels
from nestlm.train.objective.distillation import DistillationLoss
from nestlm.train.objective.elastic import ElasticObjective
from nestlm.train.objective.elastic_values import ElasticValues, draws_per_token
from nestlm.train.stage_settings import ElasticSettings
from nestlm.train.task import Task

PROBED_SEQUENCES = 16  # of calibration text


@dataclass(frozen=True, kw_only=True)
class ElasticResult(TrainingResult):
    """Result of the elastic stage: steps and tokens, and validation losses after training.

    Attributes:
        full: loss of the whole model.
        smallest: loss of the smallest sub-network.
    """

    full: float
    smallest: float


@dataclass(frozen=True, kw_only=True)
class ElasticStage(SpaceSettings, TrainingStage[ElasticResult]):
    """Leaves the nested model, and a record of what the drawn sub-networks lost."""

    name = "elastic"
    after = ("rank",)

    elastic: ElasticSettings
    sampler: Sampler
    teacher: DistillationLoss

    @property
    @override
    def num_steps(self) -> int:
        return self.elastic.steps

    @property
    @override
    def needs_teacher(self) -> bool:
        return self.teacher.needs_teacher

    def make_values(self) -> ElasticValues | None:
        """Build the networks that learn the values of choices; None where tokens do not draw choices of their own."""
        settings = self.elastic.values
        drawn = self.sampler.draw(self.space(), seed=self.seed, step=0, batch=(1, 1))
        if settings is None or not any(draws_per_token(each) for each in drawn):
            return None
        return ElasticValues(
            self.space(),
            hidden_size=self.model.decoder_config().hidden_size,
            hidden_width=settings.hidden_width,
            seed=self.seed,
        )

    @override
    def load_models(self, runtime: StageRuntime) -> StageModels:
        return StageModels(self.load_decoder(runtime, "rank"), self.load_teacher(runtime))

    @override
    def task(self, models: StageModels) -> Task:
        values = self.make_values()
        trained: dict[str, tuple[nn.Module, float]] = {"decoder": (models.decoder, self.elastic.lr)}
        if values is not None and self.elastic.values is not None:
            trained["values"] = (values, self.elastic.values.lr)
        objective = ElasticObjective(
            self.space(), sampler=self.sampler, distillation=self.teacher, values=values, seed=self.seed
        )
        return Task(models, objective, trained, self.num_steps)

    @override
    def forward_passes(self) -> float:
        return sampled_passes(self, self.sampler, self.teacher, data=self.data, seed=self.seed)

    @override
    def run(self, runtime: StageRuntime) -> ElasticResult:
        models = self.load_models(runtime)
        task = self.task(models)
        trained = self.train(task, runtime, callbacks=self.probes(models.decoder, runtime))
        runtime.save_module(models.decoder, MODEL)
        assert isinstance(task.objective, ElasticObjective), "it records what sub-networks lost"
        runtime.save_tensors(task.objective.record(), RECORD)
        scores = self.score(models.decoder, {"full": full, "smallest": fixed(self.space().smallest())}, runtime)
        return ElasticResult(**vars(trained), full=scores["full"].loss, smallest=scores["smallest"].loss)

    def probes(self, decoder: Decoder, runtime: StageRuntime) -> list[Probe]:
        """Make the callback that logs what sub-networks lose on the way, where `elastic_probe_steps` asks for it.

        It probes sub-networks that have the same level of width at every site.
        """
        if not runtime.probe_steps or not self.num_steps:
            return []
        space, flops = self.space(), flops_table(self, self.data.sequence_length, per_token=False)
        top = max(space.max_choices - 1, 1)
        specs = [
            space.spec({site: round(level / top * (len(widths) - 1)) for site, widths in space.choices.items()})
            for level in range(top + 1)
        ]
        policies = {f"at_{flops.share(spec):.2f}": fixed(spec) for spec in specs}
        calibration = self.calibration_data(decoder, runtime, num_sequences=PROBED_SEQUENCES)
        return [Probe(self.name, calibration=calibration, policies=policies, every=runtime.probe_steps)]
