"""Export to a Hugging Face folder: a model of the family itself, or one that brings its own modelling file along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor

from nestlm.export import remote
from nestlm.export.place import new_folder, writing
from nestlm.export.routing import Routing
from nestlm.model import hub
from nestlm.model.checkpoint import read_config, shard_files
from nestlm.model.family import Family
from nestlm.nn.config import BlockConfig
from nestlm.nn.decoder import Decoder

OURS_TO_WRITE = {"config.json", "model.safetensors.index.json"}
TOKENIZER = {  # files of a tokenizer
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip
SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
NESTED, ROUTED, DECISIONS = "modeling_nested", "modeling_routed", "modeling_decisions"  # files of `remote`, for Llama


def export(decoder: Decoder, family: Family, out: Path, *, shard_size: str = "5GB") -> None:
    """Write a stand-alone model: config.json, safetensors, the parent's tokenizer files, and SHA256SUMS of all.

    Args:
        decoder: of the family's size, or a sub-network of it.
        family: the size that the decoder was made from. Where it has weights, their dtypes, their config.json but for
            the widths, and the files beside them are kept.
        out: a folder that does not exist yet, or is empty; it appears whole or not at all.
        shard_size: of a safetensors file, at most.

    Raises:
        ExportError: a folder that holds something, or cannot be written.
    """
    with new_folder(out) as folder, writing(out):
        write(decoder, family, folder, shard_size=shard_size)


def write(
    decoder: Decoder,
    family: Family,
    folder: Path,
    *,
    routing: Routing | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
    shard_size: str = "5GB",
) -> None:
    """Fill a folder with a stand-alone model; see `export`.

    Args:
        decoder: what is stored.
        family: the size that it was made from.
        folder: an empty one.
        routing: where tokens decide in it; None: nowhere.
        dtype: of the weights; None: the parent's.
        tokenizer: whether the parent's is the model's.
        shard_size: of a file, at most.
    """
    weights = state(decoder, family, dtype=dtype)
    if routing is not None:
        weights |= routing.weights
    kind = modelling(decoder, family, routing)
    size = replace(family, num_layers=len(decoder.config.blocks))
    if kind is None:
        write_config(replace(size, **fields(decoder.config.blocks[0])), folder)
    else:
        write_config(size, folder)
        write_modelling(decoder, family, folder, kind=kind, routing=routing)
    if dtype is not None or family.weights is None:
        set_dtype(folder, weights)
    save_torch_state_dict(weights, folder, max_shard_size=shard_size)
    if family.weights is not None:
        copy_side_files(family.folder, folder, besides=OURS_TO_WRITE if tokenizer else OURS_TO_WRITE | TOKENIZER)


def modelling(decoder: Decoder, family: Family, routing: Routing | None) -> str | None:
    """The modelling file that a model has to bring along; None where transformers has its class."""
    if routing is not None:
        return ROUTED
    first, *others = set(decoder.config.blocks)
    opens = not family.heads_divide_hidden_size or family.hidden_size % first.num_heads == 0
    return None if opens and not others else NESTED


def fields(block: BlockConfig) -> dict[str, int]:
    """Widths of a block as fields of a family."""
    return {"num_heads": block.num_heads, "num_kv_groups": block.num_kv_groups, "mlp_width": block.mlp_width}


def write_config(size: Family, folder: Path) -> None:
    """The config.json: the parent's, as it is where no width changed."""
    path, own = folder / "config.json", size.write()
    if size.weights is None:
        write_json(path, own)
        return
    config = read_config(size.folder)
    known = size.read(config)
    if all(known[name] == getattr(size, name) for name in ("num_layers", "num_heads", "num_kv_groups", "mlp_width")):
        shutil.copyfile(size.folder / "config.json", path)
        return
    if known["num_layers"] != size.num_layers:  # all layers look at all tokens: the reader's own default says so
        config.pop("layer_types", None)
    write_json(path, config | {name: own[name] for name in SIZES})


def write_modelling(decoder: Decoder, family: Family, folder: Path, *, kind: str, routing: Routing | None) -> None:
    """The modelling file in the family's names, and the keys of config.json that lead to it."""
    name = family.architecture.removesuffix("ForCausalLM")
    for each in (NESTED,) if kind == NESTED else (NESTED, DECISIONS, ROUTED):
        source = Path(remote.__path__[0], f"{each}.py").read_text(encoding="utf-8")
        text = source.replace("Llama", name).replace("llama", family.model_type)
        (folder / f"{each}.py").write_text(text, encoding="utf-8")
    prefix = kind.removeprefix("modeling_")
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    layers = {
        str(layer): {
            "intermediate_size": block.mlp_width,
            "num_attention_heads": block.num_heads,
            "num_key_value_heads": block.num_kv_groups,
        }
        for layer, block in enumerate(decoder.config.blocks)
    }
    own: dict[str, Any] = {
        "architectures": [f"{prefix.title()}{name}ForCausalLM"],
        "model_type": f"{prefix}_{family.model_type}",
        "head_dim": family.head_dim,
        "auto_map": {auto: f"{kind}.{prefix.title()}{name}{suffix}" for auto, suffix in classes.items()},
        "per_layer_config": layers,
    }
    path = folder / "config.json"
    write_json(path, read_config(folder) | own | ({} if routing is None else {"router": routing.config}))


def set_dtype(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Name the dtype of the weights in a config.json that says another, or none."""
    largest = max(weights.values(), key=lambda weight: weight.numel())
    config, name = read_config(folder), str(largest.dtype).removeprefix("torch.")
    if config.get("dtype", config.get("torch_dtype")) != name:
        config.pop("torch_dtype", None)
        write_json(folder / "config.json", config | {"dtype": name})


def write_json(path: Path, value: Any) -> None:
    """A file as transformers lays it out."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def state(decoder: Decoder, family: Family, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights under their Hugging Face names, in one dtype, or the parent's, or their own where it has none."""
    parameters = dict(decoder.named_parameters())
    dtypes = {} if family.weights is None or dtype is not None else parent_dtypes(family.folder)
    named = family.hf_names(decoder).items()
    return {
        theirs: parameters[ours].detach().to("cpu", dtype or dtypes.get(theirs, parameters[ours].dtype))
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


def copy_side_files(parent: Path, folder: Path, *, besides: set[str]) -> None:
    """Tokenizer, generation settings and what else small lies beside a checkpoint, unchanged."""
    for pattern in hub.SMALL:
        for path in parent.glob(pattern):
            if path.name not in besides:
                shutil.copyfile(path, folder / path.name)
