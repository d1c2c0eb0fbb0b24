"""The order of rows is a pure function of (seed, step) on any number of ranks and workers."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nestlm.data.mixed_rows import BLOCK_SAMPLES, MixedRows, block_counts
from nestlm.data.preparation import prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import Portion
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.step_loader import StepLoader
from nestlm.distributed.collectives import RowShard
from nestlm.errors import ConfigError

LENGTH, BATCH = 80, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, tokenizer = tmp_path_factory.mktemp("order"), None
    for number, documents in enumerate((90, 120)):
        source, folder = Synthetic(num_documents=documents, num_words=100, seed=number), root / str(number)
        folder.mkdir()
        prepare_source(source, folder, vocab_size=288, tokenizer_file=tokenizer, heldout_share=0.1, shard_tokens=4000)
        tokenizer = folder / "tokenizer.json"
    return [root / "0", root / "1"]


@pytest.fixture(params=["shards", "mixture"])
def prepared(request, folders) -> PreparedData:
    weights = {"shards": [1.0], "mixture": [0.7, 0.3]}[request.param]
    return PreparedData.open([Portion(path, weight) for path, weight in zip(folders, weights, strict=False)])


def loader(prepared: PreparedData, **changes) -> StepLoader:
    arguments = {"batch_size": BATCH, "seed": 5, "stream": "t", "separator": None} | changes
    return StepLoader(prepared.rows("train", sequence_length=LENGTH), **arguments)


def ids(prepared: PreparedData, loaders: list[StepLoader], *, num_steps: int) -> list[list[int]]:
    """Return the indices of the rows that all ranks see in each step, identified by their tokens."""
    rows = prepared.rows("train", sequence_length=LENGTH)
    number_of = {rows[index][:-1].astype(np.int64).tobytes(): index for index in range(len(rows))}
    assert len(number_of) == len(rows), "rows can be told apart"
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for each in loaders:
        for step, batch in zip(range(num_steps), iter(each), strict=False):
            steps[step] += [number_of[row.numpy().tobytes()] for row in batch.tokens_BL]
            if step == num_steps - 1:
                break
    return steps


def test_a_resume_on_other_ranks_and_workers_sees_each_sample_once(prepared):
    """Two ranks with workers, then three without, then one see together what one rank sees alone, in whole epochs."""
    num_rows = len(prepared.rows("train", sequence_length=LENGTH))
    num_steps = 2 * num_rows // BATCH
    alone = ids(prepared, [loader(prepared, num_steps=num_steps)], num_steps=num_steps)
    seen, states = [], [{"next_step": 0}]
    for world_size, num_workers, stop in ((2, 1, 5), (3, 0, 12), (1, 2, num_steps)):
        start = states[0]["next_step"]
        ranks = [
            loader(prepared, num_steps=stop, row_shard=RowShard(rank, world_size), num_workers=num_workers)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(states[0])
        seen += ids(prepared, ranks, num_steps=stop - start)
        states = [rank.state_dict() for rank in ranks]
        assert states == [{"next_step": stop}] * world_size
    assert [sorted(step) for step in seen] == [sorted(step) for step in alone]
    if len(prepared.portions) == 1:
        first_epoch = [row for step in seen for row in step][:num_rows]
        whole_steps = num_rows // BATCH * BATCH
        assert len(set(first_epoch[:whole_steps])) == whole_steps, "no sample twice"
        counts = Counter(row for step in seen for row in step)
        assert set(counts.values()) <= {1, 2}
        assert len(counts) == num_rows


def test_a_mixture_keeps_its_weights_and_each_parts_epochs(folders):
    portions = [Portion(folders[0], 2.0), Portion(folders[1], 1.0)]
    rows = PreparedData.open(portions).rows("train", sequence_length=LENGTH)
    assert isinstance(rows, MixedRows)
    order = [rows.sample(position, seed=0, stream="s") for position in range(2 * BLOCK_SAMPLES)]
    ends = [len(part) for part in rows.parts]
    of_part = [[row for row in order if row < ends[0]], [row - ends[0] for row in order if row >= ends[0]]]
    assert [len(part) for part in of_part] == [13334, 6666]
    for part, size in zip(of_part, ends, strict=True):
        for epoch in range(len(part) // size):
            assert sorted(part[epoch * size : (epoch + 1) * size]) == list(range(size)), "each row once an epoch"
    drawn = Counter(row < ends[0] for row in order[:600])
    assert 330 < drawn[True] < 470, "mixed from the start"
    far = [5 * BLOCK_SAMPLES + 17, 3, 5 * BLOCK_SAMPLES + 18]  # in any order, without what lies between
    fresh = PreparedData.open(portions).rows("train", sequence_length=LENGTH)
    assert [fresh.sample(p, seed=0, stream="s") for p in far][1] == order[3]
    assert fresh.sample(3, seed=1, stream="s") != order[3] or fresh.sample(4, seed=1, stream="s") != order[4]
    before = sum(rows.sample(p, seed=0, stream="s") < ends[0] for p in range(BLOCK_SAMPLES, 2 * BLOCK_SAMPLES))
    assert before == 6667


def test_held_out_rows_of_a_mixture_are_all_of_them(folders):
    prepared = PreparedData.open([Portion(folders[0], 9.0), Portion(folders[1], 1.0)])
    rows = prepared.rows("validation", sequence_length=LENGTH)
    assert isinstance(rows, MixedRows)
    parts = [rows.parts[0][index] for index in range(len(rows.parts[0]))]
    parts += [rows.parts[1][index] for index in range(len(rows.parts[1]))]
    assert len(rows) == len(parts)
    assert all(np.array_equal(rows[index], part) for index, part in enumerate(parts))
    assert prepared.split("validation").tokens == sum(m.splits["validation"].tokens for m in prepared.manifests)


def test_shares_are_rounded_by_the_largest_remainders():
    assert block_counts([1, 1, 1]) == [3334, 3333, 3333]
    assert block_counts([0.7, 0.3]) == [7000, 3000]
    assert block_counts([5]) == [BLOCK_SAMPLES]
    with pytest.raises(ConfigError, match=r"data\.sources: got weight 1e-06"):
        block_counts([1.0, 1e-6])
