"""Measure claim 10: tokens per second of the data loader alone, over those of training the tiny model.

OMP_WAIT_POLICY=PASSIVE python benchmarks/loader.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import Row, main
from nestlm.config.compose import build, compose
from nestlm.data.datamodule import PackedTokens
from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.nn.decoder import Decoder
from nestlm.train.objective.pretrain import PretrainObjective
from shapes import Shape, training_step
from turns import Spread, ratio, take_turns

STEPS = 20


def rows(shape: Shape, *, repeats: int) -> Iterator[Row]:
    """Yield the row for the demo's data and batches, loaded in this process with checksums verified."""
    if shape.config.hidden_size != 256:  # one model is enough: it is the demo's
        return
    settings = build(compose([]))
    config, data = settings.model.decoder_config(), settings.data
    with TemporaryDirectory() as folder:
        prepare_source(
            data.source, Path(folder), vocab_size=config.vocab_size, tokenizer_file=None,
            heldout_share=data.heldout_share,
        )  # fmt: skip
        module = PackedTokens(data, PreparedData.read(Path(folder)), seed=0, stream="pretrain", num_steps=STEPS)
        decoder = Decoder(config)
        decoder.init_weights(seed=0)
        batch = next(iter(module.train_dataloader()))
        step = training_step(decoder, PretrainObjective(), batch, first_steps=1)
        seconds = take_turns(
            {"loader": lambda: [None for _ in module.train_dataloader()], "training": step}, repeats=repeats
        )
    loaded, trained = ([turn / steps for turn in seconds[name]] for name, steps in (("loader", STEPS), ("training", 1)))
    tokens = data.batch_size * data.sequence_length
    speeds = [Spread.of([tokens / turn for turn in turns]).middle for turns in (loaded, trained)]
    yield Row(
        "10. the loader's tokens/s over a training step's", "`model=tiny`", ratio(trained, loaded), 20.0,
        f"{speeds[0]:,.0f} and {speeds[1]:,.0f}", at_least=True,
    )  # fmt: skip


if __name__ == "__main__":
    main(rows)
