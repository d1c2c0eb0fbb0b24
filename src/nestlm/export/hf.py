"""Export to a Hugging Face folder that `transformers` opens as a model of the family itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

from nestlm.errors import ExportError
from nestlm.model import hub
from nestlm.model.checkpoint import CHECKSUMS, read_config, sha256, shard_files
from nestlm.model.family import Family
from nestlm.nn.decoder import Decoder

OURS_TO_WRITE = {"config.json", "model.safetensors.index.json"}
SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")


def export(decoder: Decoder, family: Family, out: Path, *, shard_size: str = "5GB") -> None:
    """Write a stand-alone model: config.json, safetensors, the parent's tokenizer files, and SHA256SUMS of all.

    Args:
        decoder: of the family's size, or a sub-network of it with the same widths in all layers.
        family: the size that the decoder was made from. Where it has weights, their dtypes, their config.json but for
            the widths, and the files beside them are kept.
        out: a folder that does not exist yet, or is empty; it appears whole or not at all.
        shard_size: of a safetensors file, at most.

    Raises:
        ExportError: layers of different widths, or a folder that holds something.
    """
    blocks = set(decoder.config.blocks)
    if len(blocks) > 1:
        raise ExportError(
            f"export: the layers have {len(blocks)} different widths, which {family.architecture} cannot hold; "
            "wanted a sub-network of equal widths"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"export: {out} is there already; wanted a new folder")
    (block,) = blocks
    size = replace(
        family,
        num_layers=len(decoder.config.blocks),
        num_heads=block.num_heads,
        num_kv_groups=block.num_kv_groups,
        mlp_width=block.mlp_width,
    )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as partial:
        folder = Path(partial) / "model"
        folder.mkdir()
        write_config(size, folder)
        save_torch_state_dict(state(decoder, family), folder, max_shard_size=shard_size)
        if family.weights is not None:
            copy_side_files(family.folder, folder)
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
        (folder / CHECKSUMS).write_text(sums, encoding="utf-8")
        if out.exists():
            out.rmdir()
        folder.rename(out)


def write_config(size: Family, folder: Path) -> None:
    """The config.json: the parent's, as it is where no width changed."""
    path, own = folder / "config.json", size.write()
    if size.weights is None:
        path.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        return
    config = read_config(size.folder)
    known = size.read(config)
    if all(known[name] == getattr(size, name) for name in ("num_layers", "num_heads", "num_kv_groups", "mlp_width")):
        shutil.copyfile(size.folder / "config.json", path)
        return
    if known["num_layers"] != size.num_layers:  # all layers look at all tokens: the reader's own default says so
        config.pop("layer_types", None)
    path.write_text(json.dumps(config | {name: own[name] for name in SIZES}, indent=2) + "\n", encoding="utf-8")


def state(decoder: Decoder, family: Family) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names, in the dtypes of the parent's, or their own where it has none."""
    parameters = dict(decoder.named_parameters())
    dtypes = {} if family.weights is None else parent_dtypes(family.folder)
    named = family.hf_names(decoder).items()
    return {
        theirs: parameters[ours].detach().to("cpu", dtypes.get(theirs, parameters[ours].dtype))
        for theirs, ours in named
    }


def parent_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor of a checkpoint."""
    dtypes = {}
    for shard in shard_files(folder):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                dtypes[name] = tensors.get_slice(name)[:0].dtype
    return dtypes


def copy_side_files(parent: Path, folder: Path) -> None:
    """Tokenizer, generation settings and what else small lies beside a checkpoint, unchanged."""
    for pattern in hub.SMALL:
        for path in parent.glob(pattern):
            if path.name not in OURS_TO_WRITE:
                shutil.copyfile(path, folder / path.name)
