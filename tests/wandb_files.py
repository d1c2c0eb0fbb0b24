"""Reads the file that an offline wandb run leaves behind."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768  # bytes; LevelDB's log format, which wandb uses, begins with a header of its own
WHOLE, LAST = 1, 4  # chunks that end a record


def records(run_dir: Path) -> list[Record]:
    """All records of the one offline run below a run's folder."""
    wandb.teardown()  # its service, which outlives runs of this process, may not have written all yet
    (written,) = run_dir.glob("logs/wandb/offline-run-*/*.wandb")
    return list(parse(written.read_bytes()))


def parse(data: bytes) -> Iterator[Record]:
    """Records of a file: chunks of checksum, length, kind and content, none across a block's end."""
    position, content = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        content += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(content)
            yield record
            content = b""


def history(run_dir: Path) -> dict[str, list[Any]]:
    """Values of each metric, in the order in which they were logged."""
    values: dict[str, list[Any]] = {}
    for record in records(run_dir):
        for item in record.history.item:
            values.setdefault(item.key or ".".join(item.nested_key), []).append(json.loads(item.value_json))
    return values
