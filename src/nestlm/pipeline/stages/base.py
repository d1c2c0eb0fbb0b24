"""What every stage is: its fields are the settings that it reads, and therefore its cache key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, get_type_hints

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from pydantic import TypeAdapter

from nestlm.cost.table import PriceList
from nestlm.data.datamodule import DataSettings, PackedTokens
from nestlm.data.prepared_data import PreparedData
from nestlm.distributed import collectives
from nestlm.distributed.fsdp import ModelPlacement
from nestlm.distributed.strategy import placement_for
from nestlm.eval.policy_scores import Scores, evaluate
from nestlm.model.family import Family
from nestlm.model.weights_io import load_weights
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Policy
from nestlm.pipeline.runtime import MODEL, ROUTER, StageRuntime
from nestlm.pipeline.settings import Settings
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.train.trainer import make_trainer, trainer_device
from nestlm.utils.checksums import matches_checksum, write_with_checksum
from nestlm.utils.console import track
from nestlm.utils.json_files import read_json, write_json
from nestlm.utils.malloc import keep_freed_blocks

NOT_A_METRIC = {"metric": False}  # metadata of a result's field that is kept out of metrics.json


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage: plain values, which stage.json holds as JSON."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Build a result from plain values; names that are no fields are ignored.

        Raises:
            ValueError: a value is missing, or has another type.
        """
        return TypeAdapter(cls).validate_python(content)

    def metrics(self) -> dict[str, Any]:
        """Return what metrics.json says of the stage: the fields without the metadata `NOT_A_METRIC`."""
        kept = [known.name for known in fields(self) if known.metadata.get("metric", True)]
        content = asdict(self)
        return {name: content[name] for name in kept}


Result = TypeVar("Result", bound=StageResult)


@dataclass(frozen=True, kw_only=True)
class Stage(ABC, Generic[Result]):
    """A step of the pipeline. A subclass adds a field for each setting that it reads, named as in `Settings`.

    A stage can reach no other setting, so its cache key, made of its fields, covers all that determines its result.

    Attributes:
        name: name of the stage, unique among all stages.
        after: names of the stages that it builds on. Its key covers their keys, and it can read their folders.
        is_alone: whether rank 0 works and the other ranks wait.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    is_alone: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Create the stage with its fields set from the settings of a run."""
        return cls(**{known.name: getattr(settings, known.name) for known in fields(cls)})

    @classmethod
    def result_type(cls) -> type[Result]:
        """Return the class of the stage's result, which the annotation of `run` names."""
        return get_type_hints(cls.run)["return"]

    @property
    def is_needed(self) -> bool:
        """Whether the run has this stage."""
        return True

    def outside_identity(self, cache: Path) -> str:
        """Identify what determines the result besides settings and code: files, or the device.

        Args:
            cache: folder of the cache, where hashes of large files can be kept.
        """
        del cache
        return ""

    @abstractmethod
    def run(self, runtime: StageRuntime) -> Result:
        """Run the stage, write its files to `runtime.folder`, and return the result."""

    def identity(self, folder: Path, *, key: str) -> str:
        """Return what the keys of later stages include for this stage: by default its key; else a hash of its files.

        Args:
            folder: the folder of the finished stage.
            key: its cache key.
        """
        del folder
        return key

    def refine(self, settings: Settings, result: Result, *, folder: Path) -> Settings:
        """Return the settings of the stages after this one, which may depend on its result."""
        del result, folder
        return settings


@dataclass(frozen=True)
class Readings:
    """The loss of the validation text in the units that people read.

    Attributes:
        val_loss: mean negative log-likelihood of a token, in nats.
        perplexity: exp(val_loss).
        bits_per_byte: loss per byte of text, comparable across tokenizers.
        accuracy: share of tokens that were the most likely ones.
    """

    val_loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class ModelStage(Stage[Result]):
    """A stage that runs the model on the text of the data stage."""

    model: Family
    trainer: Callable[..., L.Trainer]
    data: DataSettings
    seed: int

    def device(self) -> torch.device:
        """Return the device on which the configured trainer computes."""
        return trainer_device(self.trainer)

    def placement(self) -> ModelPlacement:
        """Return where models are placed: on one device, or in shards on several. All ranks must call it together."""
        return placement_for(make_trainer(self.trainer))

    def new_decoder(self, runtime: StageRuntime) -> Decoder:
        """Build the model on the trainer's device, with uninitialised weights."""
        return self.place(self.decoder_on_meta(runtime))

    def load_decoder(self, runtime: StageRuntime, stage: str) -> Decoder:
        """Build the model on the trainer's device, with the weights that an earlier stage wrote."""
        return self.fill(self.new_decoder(runtime), runtime, stage)

    def decoder_on_meta(self, runtime: StageRuntime) -> Decoder:
        """Build the model on the meta device."""
        config = self.model.decoder_config()
        return Decoder.on_meta(config, activation_checkpointing=runtime.activation_checkpointing)

    def place(self, decoder: Decoder) -> Decoder:
        """Move a model from the meta device to the trainer's, with uninitialised weights; return the model."""
        keep_freed_blocks(self.device())
        self.placement().place(decoder, blocks=decoder.blocks)
        return decoder

    def fill(self, decoder: Decoder, runtime: StageRuntime, stage: str) -> Decoder:
        """Load the weights that an earlier stage wrote into a model; return the model."""
        load_weights(decoder, runtime.inputs[stage] / MODEL)
        return decoder

    def packed_tokens(self, runtime: StageRuntime, *, stream: str, num_steps: int = 0) -> PackedTokens:
        """Open the packed rows that the data stage wrote.

        Args:
            runtime: has the folder of the data stage.
            stream: name that seeds the order of the rows, so that each stage trains in another order.
            num_steps: number of training steps.
        """
        prepared = PreparedData.read(runtime.inputs["data"])
        return PackedTokens(self.data, prepared, seed=self.seed, stream=stream, num_steps=num_steps)

    def calibration_data(self, decoder: Decoder, runtime: StageRuntime, *, num_sequences: int) -> CalibrationData:
        """Load calibration text, and move it and the model to the trainer's device. All ranks get the same text.

        The state of torch's random generator does not change.
        """
        device = self.device()
        tokens = self.packed_tokens(runtime, stream="calibration")
        loader = tokens.heldout_dataloader("calibration", num_rows=num_sequences, shared=False)
        precision = make_trainer(self.trainer).precision_plugin.forward_context
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for workers, also where it has none
            batches = [move_data_to_device(batch, device) for batch in loader]
        return CalibrationData(decoder.to(device), batches, precision)

    def score(
        self,
        decoder: Decoder,
        policies: Mapping[str, Policy],
        runtime: StageRuntime,
        *,
        prices: Mapping[str, PriceList] | None = None,
    ) -> dict[str, Scores]:
        """Measure validation loss and accuracy under each policy. A resumed run reads the scores on disk.

        Args:
            decoder: the model.
            policies: policies by a name, which becomes part of a file name.
            runtime: has the folder to which scores are written.
            prices: by the same names, the prices at which the cost of a policy is measured; None: no costs.
        """
        loader = self.packed_tokens(runtime, stream="validation").heldout_dataloader("validation")
        trainer = make_trainer(self.trainer)
        scores: dict[str, Scores] = {}
        for name, policy in track(policies.items(), "evaluate", total=len(policies)):
            path = runtime.folder / f"score-{name}.json"
            if not collectives.broadcast_from_rank_zero(matches_checksum(path)):
                list_ = prices[name] if prices is not None else None
                found = evaluate(decoder, policy, loader=loader, trainer=trainer, prices=list_)
                if collectives.rank() == 0:
                    write_with_checksum(path, lambda partial, found=found: write_json(partial, asdict(found)))
                collectives.barrier()
            scores[name] = Scores.from_json(read_json(path, cure="start the run again"))
        return scores

    def readings(self, scores: Scores, runtime: StageRuntime) -> Readings:
        """Convert scores on the validation text to the units that people read."""
        split = PreparedData.read(runtime.inputs["data"]).split("validation")
        bits_per_byte = scores.bits_per_byte(tokens=split.tokens, num_bytes=split.bytes)
        return Readings(scores.loss, scores.perplexity, bits_per_byte, scores.accuracy)


def load_router(router: Router, folder: Path) -> Router:
    """Load the state that a stage wrote to its folder into a router; return the router."""
    if router.state_dict():
        load_weights(router, folder / ROUTER)
    return router


def save_router(router: Router, runtime: StageRuntime) -> None:
    """Write the state of a router, where it has any, to the stage's folder."""
    if router.state_dict():
        runtime.save_module(router, ROUTER)


def prepare_router(router: Router, calibration: CalibrationData) -> None:
    """Call `router.prepare` on all ranks, then broadcast the router's buffers from rank 0."""
    router.to(calibration.device).prepare(calibration)
    collectives.broadcast_module(router)
