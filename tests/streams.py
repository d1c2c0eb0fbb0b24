"""Checks of stream sources: the same order on any number of ranks, and exact resuming on another number."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from nestlm.data.preparation import prepare_source
from nestlm.data.sources.base import StreamSource
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.stream_loader import StreamLoader
from nestlm.data.tokenizer import load_tokenizer, make_text_encoder
from nestlm.distributed.collectives import ALL_ROWS, RowShard

HELD_OUT, LENGTH, BATCH = 60, 32, 6
OPTIMISE = """
import json, sys
from pathlib import Path
import litdata
def same(item):
    return item
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, items in json.loads((folder / "items.json").read_text()).items():
        litdata.optimize(
            same, items, output_dir=str(folder / name), chunk_size=7, num_workers=1, compression_level="chunk",
            compression="zstd" if name in sys.argv[2:] else None,
        )
"""


def hundred_texts() -> list[str]:
    """Return 100 texts, one of which is blank."""
    documents = [text for _, text in Synthetic(num_documents=100, num_words=60, seed=0).documents()]
    documents[70] = " "
    return documents


def optimise(datasets: dict[str, list], folder: Path, *packed: str) -> Path:
    """Write datasets with litdata, seven items per chunk, in a separate process, because litdata forks.

    `packed` names the datasets whose chunks are compressed.
    """
    script = folder / "optimise.py"
    script.write_text(OPTIMISE)
    (folder / "items.json").write_text(json.dumps(datasets))
    subprocess.run([sys.executable, str(script), str(folder), *packed], check=True, capture_output=True)
    return folder


def loader(source: StreamSource, tokenizer: Path, *, num_steps: int, row_shard: RowShard = ALL_ROWS) -> StreamLoader:
    """Create the loader of one rank."""
    loaded = load_tokenizer(tokenizer)
    return StreamLoader(
        source, make_text_encoder(loaded), num_steps=num_steps, batch_size=BATCH, sequence_length=LENGTH,
        document_separator=0, vocab_size=288, separate_documents=False, row_shard=row_shard,
    )  # fmt: skip


def check_order_and_resume(source: StreamSource, folder: Path) -> None:
    """Check that two ranks, then three, then one read one and a half epochs in order, every token once an epoch."""
    prepare_source(source, folder, vocab_size=288, tokenizer_file=None, heldout_share=0.4)
    tokenizer = folder / "tokenizer.json"
    encoder = make_text_encoder(load_tokenizer(tokenizer))
    once = [
        token
        for _, text in source.numbered_texts(HELD_OUT)
        for token in [0, *encoder.encode(text, add_special_tokens=False).ids]
    ]
    num_steps = int(1.5 * len(once) / (BATCH * LENGTH))
    assert num_steps > 10
    seen, state = [], {"next_step": 0, "number": HELD_OUT, "offset": 0}
    for world_size, stop in ((2, 3), (3, 7), (1, num_steps)):
        ranks = [
            loader(source, tokenizer, num_steps=stop, row_shard=RowShard(r, world_size)) for r in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        for batches in zip(*ranks, strict=True):
            rows = np.empty((BATCH, LENGTH), dtype=np.int64)
            for number, batch in enumerate(batches):
                rows[number::world_size] = batch.tokens_BL.numpy()
            seen += rows.flatten().tolist()
        states = [rank.state_dict() for rank in ranks]
        state = states[0]
        assert states == [state] * world_size
        assert state["next_step"] == stop
    assert seen == (once + once)[: num_steps * BATCH * LENGTH], "and begins again behind the held-out documents"
