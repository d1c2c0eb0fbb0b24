"""Export to a Hugging Face folder, with a modelling file where no class of transformers can hold the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from nestlm.errors import ExportError
from nestlm.export import remote
from nestlm.export.exported_router import ExportedRouter
from nestlm.export.missing_parts import fill_missing_parts
from nestlm.export.new_folder import naming_write_errors, new_folder
from nestlm.export.weight_range import check_weight_range
from nestlm.model.checkpoint import CONFIG, read_checkpoint_json, read_hf_config
from nestlm.model.family import Family
from nestlm.model.parent_files import (
    GENERATION,
    TOKENIZER_CONFIG,
    TOKENIZER_OBJECTS,
    ParentFiles,
    drop_code_keys,
    write_files,
)
from nestlm.nn.config import BlockConfig
from nestlm.nn.decoder import Decoder
from nestlm.utils.json_files import to_json
from nestlm.utils.quiet import TORCHAO_LOGGERS, quiet_loggers

SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
WIDTHS = ("num_layers", "num_heads", "num_kv_groups", "mlp_width")  # fields of a family that an export may change
OBJECTS = (CONFIG, GENERATION, *TOKENIZER_OBJECTS)  # JSON files that can name code for transformers to run
CODE_SUFFIXES = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".pkl", ".pickle")  # files that hold code, or can
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NESTED, ROUTED, DECISIONS = "modeling_nested", "modeling_routed", "modeling_decisions"  # files of `remote`


def export_hf(decoder: Decoder, family: Family, out: Path, *, shard_size: str = "5GB") -> None:
    """Write a stand-alone model: config.json, safetensors, the parent's tokenizer files, and SHA256SUMS of all.

    Args:
        decoder: a model of the family's size, or a stand-alone sub-network of it.
        family: the family and sizes that the decoder was made from. If the family names a checkpoint, the export keeps
            the checkpoint's dtypes, tokenizer, generation settings, and all of its config.json except the widths.
        out: a folder that does not exist yet, or is empty; after an error nothing is left of it.
        shard_size: largest size of a safetensors file, such as 5GB.

    Raises:
        ExportError: the folder is not empty, or cannot be written.
    """
    parent = family.read_parent_files()
    with new_folder(out) as folder, naming_write_errors(out):
        write_hf_folder(decoder, family, folder, parent=parent, shard_size=shard_size)


def write_hf_folder(
    decoder: Decoder,
    family: Family,
    folder: Path,
    *,
    parent: ParentFiles | None = None,
    routing: ExportedRouter | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: bool = True,
    shard_size: str = "5GB",
) -> None:
    """Write the files of a stand-alone model to an empty folder.

    Args:
        decoder: the model to store.
        family: the family and sizes that the decoder was made from.
        folder: an empty folder.
        parent: files and dtypes of the parent checkpoint; None: the model was trained from scratch.
        routing: the dynamic router to store; None: the model has none.
        dtype: dtype of the weights; None: the parent's, without a parent the decoder's own.
        tokenizer: whether to write the parent's tokenizer files.
        shard_size: largest size of a safetensors file, such as 5GB.

    Raises:
        ExportError: a weight is outside the range of its dtype.
    """
    kind = modelling_file(decoder, family, routing)
    # transformers' KV cache has an entry for each layer, and counts tokens in the first: all layers need attention
    decoder = fill_missing_parts(decoder, mlp=False)
    weights = hf_state_dict(decoder, family, parent=parent, dtype=dtype)
    if routing is not None:
        weights |= routing.weights
    size = replace(family, num_layers=len(decoder.config.blocks))
    if kind is None:
        write_config(replace(size, **family_widths(decoder.config.blocks[0])), folder, parent)
    else:
        write_config(size, folder, parent)
        write_modelling(decoder, family, folder, kind=kind, routing=routing)
    if dtype is not None or parent is None:
        set_dtype(folder, weights)
    save_torch_state_dict(weights, folder, max_shard_size=shard_size)
    if parent is not None:
        kept = {GENERATION: parent.files[GENERATION]} if GENERATION in parent.files else {}
        write_files(folder, kept | (with_known_class(parent.tokenizer_files) if tokenizer else {}))


def with_known_class(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a copy of a tokenizer's files in which the config names a class that transformers has.

    A class that transformers lacks is replaced by `PreTrainedTokenizerFast`, which opens any tokenizer.json.
    """
    config = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    if is_known_class(config.get("tokenizer_class")):
        return dict(files)
    return {**files, TOKENIZER_CONFIG: to_json(config | {"tokenizer_class": "PreTrainedTokenizerFast"}).encode()}


def is_known_class(name: Any) -> bool:
    """Tell whether a config's `tokenizer_class` is a class of transformers, or absent (None)."""
    with quiet_loggers(*TORCHAO_LOGGERS):  # transformers imports torchao
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        return name is None or (isinstance(name, str) and tokenizer_class_from_name(name) is not None)


def modelling_file(decoder: Decoder, family: Family, routing: ExportedRouter | None) -> str | None:
    """Return the name of the modelling file that a model needs; None if a class of transformers can hold the model."""
    if routing is not None:
        return ROUTED
    first, *others = set(decoder.config.blocks)
    if others or first.num_heads == 0 or first.mlp_width == 0:
        return NESTED
    opens = not family.heads_divide_hidden_size or family.hidden_size % first.num_heads == 0
    return None if opens else NESTED


def family_widths(block: BlockConfig) -> dict[str, int]:
    """Return the widths of a block by the names of a family's fields."""
    return {"num_heads": block.num_heads, "num_kv_groups": block.num_kv_groups, "mlp_width": block.mlp_width}


def write_config(size: Family, folder: Path, parent: ParentFiles | None) -> None:
    """Write config.json: the parent's with the export's widths, or one made from the family without a parent.

    The parent's file is copied byte for byte if no width changed and no key has to be dropped.

    Args:
        size: the family with the export's widths.
        folder: the folder to write to.
        parent: files of the parent checkpoint; None: there is no parent.
    """
    path, own = folder / CONFIG, size.make_hf_config()
    if parent is None:
        write_hf_json(path, own)
        return
    config, unused = parent.config, size.unused_window_keys(parent.config)
    known = size.parse_hf_config(config)
    if not is_known_class(config.get("tokenizer_class")):
        unused |= {"tokenizer_class"}
    changed = any(known[name] != getattr(size, name) for name in WIDTHS)
    if not changed and not unused:
        write_files(folder, {CONFIG: parent.files[CONFIG]})
        return
    if known["num_layers"] != size.num_layers:  # full attention in all layers is transformers' default
        unused |= {"layer_types"}
    kept = {name: value for name, value in config.items() if name not in unused}
    write_hf_json(path, kept | {name: own[name] for name in SIZES})


def write_modelling(
    decoder: Decoder, family: Family, folder: Path, *, kind: str, routing: ExportedRouter | None
) -> None:
    """Write the modelling files of `kind`, and add the keys to config.json by which transformers opens them."""
    for name, text in modelling_files(kind, family).items():
        (folder / name).write_text(text, encoding="utf-8")
    name, prefix = class_infix(family), kind.removeprefix("modeling_")
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
        "auto_map": auto_map(kind, family),
        "per_layer_config": layers,
    }
    path = folder / CONFIG
    write_hf_json(path, read_hf_config(folder) | own | ({} if routing is None else {"router": routing.config}))


def class_infix(family: Family) -> str:
    """Return a family's name in transformers' class names, such as Llama."""
    return family.architecture.removesuffix("ForCausalLM")


def modelling_files(kind: str, family: Family) -> dict[str, str]:
    """Return the texts of the modelling files of a kind by file name, with Llama's names replaced by the family's."""
    names = (NESTED,) if kind == NESTED else (NESTED, DECISIONS, ROUTED)
    texts = {each: Path(remote.__path__[0], f"{each}.py").read_text(encoding="utf-8") for each in names}
    return {
        f"{each}.py": text.replace("Llama", class_infix(family)).replace("llama", family.model_type)
        for each, text in texts.items()
    }


def auto_map(kind: str, family: Family) -> dict[str, str]:
    """Return the value of config.json's key `auto_map`, which names the classes of the modelling file."""
    prefix = f"{kind}.{kind.removeprefix('modeling_').title()}{class_infix(family)}"
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {auto: f"{prefix}{suffix}" for auto, suffix in classes.items()}


def check_code(folder: Path, family: Family, kind: str | None) -> None:
    """Check that a folder holds no code other than nestlm's modelling files, before transformers opens it.

    Args:
        folder: the export.
        family: the export's family.
        kind: name of the export's modelling file; None: it has none.

    Raises:
        ExportError: the folder holds another file of code or a link, or one of its JSON files names other code.
    """
    files = {} if kind is None else modelling_files(kind, family)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_ours = name in files and path.read_bytes() == files[name].encode()
        if path.is_symlink() or (path.suffix in CODE_SUFFIXES and not is_ours):
            raise ExportError(f"export: {name} is not a file of nestlm; nothing was run, and nothing is left of it")
    for path in folder.glob("*.json"):
        if path.name in OBJECTS:
            content = read_checkpoint_json(folder, path.name)
            if path.name == CONFIG and kind is not None and content.get("auto_map") == auto_map(kind, family):
                del content["auto_map"]
            if drop_code_keys(content) != content:
                raise ExportError(f"export: {path.name} leads to code that is not nestlm's; nothing was run")


def set_dtype(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Set config.json's dtype to that of the largest weight."""
    largest = max(weights.values(), key=lambda weight: weight.numel())
    config, name = read_hf_config(folder), str(largest.dtype).removeprefix("torch.")
    if config.get("dtype", config.get("torch_dtype")) != name:
        config.pop("torch_dtype", None)
        write_hf_json(folder / CONFIG, config | {"dtype": name})


def write_hf_json(path: Path, value: Any) -> None:
    """Write a value as JSON in the layout of transformers' own files."""
    path.write_bytes(to_json(value).encode())


def hf_state_dict(
    decoder: Decoder, family: Family, *, parent: ParentFiles | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the weights by Hugging Face name, on the CPU.

    Args:
        decoder: the model.
        family: gives the names.
        parent: gives the dtype of each weight by name; a weight that it lacks keeps its own.
        dtype: one dtype for all weights, instead of the parent's.

    Raises:
        ExportError: a weight is not finite, or outside the range of its dtype.
    """
    parameters = dict(decoder.named_parameters())
    dtypes = {} if parent is None or dtype is not None else parent_dtypes(parent)
    weights = {}
    for theirs, ours in family.hf_names(decoder).items():
        value = parameters[ours].detach()
        wanted = dtype or dtypes.get(theirs, value.dtype)
        check_weight_range(value, str(wanted).removeprefix("torch."), torch.finfo(wanted).max, name=theirs)
        weights[theirs] = value.to("cpu", wanted)
    return weights


def parent_dtypes(parent: ParentFiles) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of a parent checkpoint by name. Raises ExportError for an unknown dtype."""
    try:
        return {name: DTYPES[kind] for name, kind in parent.dtypes.items()}
    except (KeyError, TypeError) as error:
        raise ExportError(f"export: the run says of its parent that a dtype is {error}; copy the run again") from error
