"""What a stage works with: its settings, its folder, what the stages before it left, and how to train and score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from nestlm.cost.table import PriceList
from nestlm.data.datamodule import PackedTokens
from nestlm.data.prepared_data import PreparedData
from nestlm.distributed import collectives
from nestlm.distributed.device_layout import Precision
from nestlm.distributed.fsdp import Placement, whole_state
from nestlm.distributed.strategy import placement_of
from nestlm.eval.policy_scores import Scores, evaluate
from nestlm.model.weights_io import load_weights, save_weights
from nestlm.nn.decoder import Decoder
from nestlm.nn.linear import hold_linear
from nestlm.nn.policy import Policy
from nestlm.pipeline.flops import flops_per_token
from nestlm.pipeline.settings import View
from nestlm.router.base import Router
from nestlm.router.calibration_data import CalibrationData
from nestlm.train.callbacks.throughput import StageThroughput
from nestlm.train.lightning_module import NestedLM
from nestlm.train.task import Task
from nestlm.train.trainer import fit, make_trainer, trainer_device
from nestlm.utils.checksums import matches_checksum, write_with_checksum
from nestlm.utils.console import track
from nestlm.utils.json_files import read_json, write_json
from nestlm.utils.malloc import keep_freed_blocks

MODEL, ROUTER, RECORD = "model.safetensors", "router.safetensors", "record.safetensors"
LATENCY_TABLE = "latency_table.json"
SKIPPABLE = "skippable"  # in the ranking's result: the blocks that may be skipped


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    Attributes:
        settings: the part of the settings that the stage declares.
        folder: where it writes.
        inputs: folders of the stages that it builds on, by name.
        logger: where training logs go.
    """

    settings: View
    folder: Path
    inputs: dict[str, Path]
    logger: Logger

    def decoder(self, stage: str | None = None) -> Decoder:
        """The model where the trainer computes: not filled yet, or as a stage left it behind."""
        return self._placed(self._on_meta(), stage)

    def teacher(self) -> Decoder | None:
        """The model before conversion, where sub-networks learn from it.

        Under mixed precision a device that holds it alone holds its linear maps in the dtype that they compute in: the
        same numbers, half the memory. One in shards is gathered in that dtype.
        """
        if not self.settings.teacher.needs_teacher:
            return None
        decoder, precision = self._on_meta(), Precision.of(self.settings.trainer)
        if precision is not None and precision.mixed and self.placement().mesh is None:
            hold_linear(decoder, precision.dtype)
        return self._placed(decoder, "pretrain")

    def _on_meta(self) -> Decoder:
        settings = self.settings
        return Decoder.on_meta(
            settings.model.decoder_config(), activation_checkpointing=settings.activation_checkpointing
        )

    def _placed(self, decoder: Decoder, stage: str | None) -> Decoder:
        keep_freed_blocks(self.device())
        self.placement().place(decoder, blocks=decoder.blocks)
        if stage is not None:
            load_weights(decoder, self.inputs[stage] / MODEL)
        return decoder

    def router(self, stage: str | None = None) -> Router:
        """The router: new, or as a stage left it behind."""
        router = self.settings.make_router()
        if stage is not None and router.state_dict():
            load_weights(router, self.inputs[stage] / ROUTER)
        return router

    def calibration(self, decoder: Decoder) -> CalibrationData:
        """Calibration text for a router to try things on."""
        return self.on_calibration_text(decoder.eval(), num_sequences=self.settings.router.num_sequences)

    def on_calibration_text(self, decoder: Decoder, *, num_sequences: int) -> CalibrationData:
        """The model and a few sequences of calibration text, on its device, the same on all ranks.

        Draws nothing from torch's generator.
        """
        device = self.device()
        loader = self.data(stream="calibration").heldout_dataloader("calibration", num_rows=num_sequences, shared=False)
        precision = make_trainer(self.settings.trainer).precision_plugin.forward_context
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for workers, also where it has none
            batches = [move_data_to_device(batch, device) for batch in loader]
        return CalibrationData(decoder.to(device), batches, precision)

    def save(self, module: nn.Module, name: str) -> None:
        """Leave weights behind, whole; of sharded ones, rank 0 gathers them."""
        state = {}
        for key, value in whole_state(module):
            if collectives.rank() == 0:
                state[key] = value.contiguous().cpu()
        self.write(state, name)

    def write(self, tensors: dict[str, Tensor], name: str) -> None:
        """Leave tensors behind: rank 0's, and all ranks go on when they are there."""
        if collectives.rank() == 0:
            save_weights(tensors, self.folder / name)
        collectives.barrier()

    def placement(self) -> Placement:
        """Where models are held."""
        return placement_of(make_trainer(self.settings.trainer))

    def device(self) -> torch.device:
        """Where the configured trainer computes."""
        return trainer_device(self.settings.trainer)

    def data(self, *, stream: str, num_steps: int = 0) -> PackedTokens:
        """The token loaders."""
        return PackedTokens(
            self.settings.data,
            PreparedData.read(self.inputs["data"]),
            seed=self.settings.seed,
            stream=stream,
            num_steps=num_steps,
        )

    def train(self, stage: str, task: Task, *, callbacks: Sequence[L.Callback] = ()) -> dict[str, Any]:
        """Run a training stage; reports its steps and tokens, and on a GPU the most memory that tensors took.

        Callbacks may look, and change nothing.
        """
        steps, device = task.steps, self.device()
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        data = self.data(stream=stage, num_steps=steps)
        tokens_per_step = data.settings.batch_size * data.settings.sequence_length
        resumed = 0
        if steps:
            module = NestedLM(
                task.models,
                stage=stage,
                objective=task.objective,
                trained=task.trained,
                optim=self.settings.optim,
                num_steps=steps,
            )
            resumed = fit(
                module,
                data,
                stage=stage,
                folder=self.folder,
                trainer_factory=self.settings.trainer,
                logger=self.logger,
                checkpoint_seconds=self.settings.checkpoint_seconds,
                callbacks=[
                    StageThroughput(
                        stage,
                        tokens_per_step=tokens_per_step,
                        flops_per_token=lambda: flops_per_token(stage, self.settings),
                    ),
                    *callbacks,
                ],
            )
        peak = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if on_cuda else {}
        return {"steps": steps, "tokens": steps * tokens_per_step, "resumed_at_step": resumed} | peak

    def score(
        self, decoder: Decoder, policies: dict[str, Policy], *, prices: dict[str, PriceList] | None = None
    ) -> dict[str, Scores]:
        """Validation loss and accuracy of policies. Each is written as soon as it is known, for a resumed run.

        Args:
            decoder: the model.
            policies: by a name that may be part of a file's.
            prices: by the same names, where what the policies spend is counted.
        """
        loader = self.data(stream="validation").heldout_dataloader("validation")
        trainer = make_trainer(self.settings.trainer)
        scores: dict[str, Scores] = {}
        for name, policy in track(policies.items(), "evaluate", total=len(policies)):
            path = self.folder / f"score-{name}.json"
            if not collectives.broadcast_from_rank_zero(matches_checksum(path)):
                list_ = prices[name] if prices is not None else None
                found = evaluate(decoder, policy, loader=loader, trainer=trainer, prices=list_)
                if collectives.rank() == 0:
                    write_with_checksum(path, lambda partial, found=found: write_json(partial, asdict(found)))
                collectives.barrier()
            scores[name] = Scores.from_json(read_json(path, cure="start the run again"))
        return scores
