"""Export to a GGUF file, which llama.cpp runs: the Llama family, with widths by layer in its `deci` architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nestlm.errors import ExportError
from nestlm.export import weight_range
from nestlm.export.gguf_vocabulary import GgufVocabulary
from nestlm.export.missing_parts import fill_missing_parts
from nestlm.model.family import Family
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.nn.rope import LinearScaling, Llama3Scaling

Precision = Literal["f32", "f16", "bf16", "q8_0"]
FAMILIES = ("llama", "mistral")  # decoders that llama.cpp computes alike
OUTER = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
BLOCK = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
BFLOAT16 = torch.finfo(torch.bfloat16).max
FACTORS = "rope_freqs.weight"  # what frequencies of rotary positions are divided by


def import_gguf() -> Any:
    """The gguf package. Raises ExportError where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ExportError("export: --format gguf needs the package gguf; pip install 'nestlm[gguf]'") from error


def check_family_fits(family: Family) -> None:
    """Raise ExportError for a family that has no place in a GGUF file of ours."""
    if family.model_type not in FAMILIES:
        raise ExportError(
            f"export: llama.cpp has widths by layer for the Llama family only, this is {family.architecture}; "
            "try --format hf"
        )
    if not isinstance(family.rope_scaling, LinearScaling | Llama3Scaling | None):
        kind = type(family.rope_scaling).__name__
        raise ExportError(f"export: {kind} of rotary positions is not written to GGUF; try --format hf")
    import_gguf()


@dataclass(frozen=True)
class TextFormat:
    """How texts and conversations are laid out in tokens.

    Attributes:
        begin: id of the token before a text.
        end: main id after a text.
        turn_end: another id at which an answer ends; None: there is none.
        pad: id that fills up rows; None: there is none.
        adds_begin: whether the tokenizer puts `begin` before a text.
        chat_templates: by name; `default` is the one for conversations.
    """

    begin: int
    end: int
    turn_end: int | None = None
    pad: int | None = None
    adds_begin: bool = True
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def write_gguf(
    decoder: Decoder, family: Family, path: Path, *, precision: Precision, tokenizer: Path, texts: TextFormat, name: str
) -> None:
    """Write a stand-alone model, a tensor at a time.

    Args:
        decoder: of the family's size, or a sub-network of it.
        family: one that `check_family_fits` takes.
        path: the file.
        precision: of matrices; rows that q8_0 cannot divide stay f16, and vectors f32.
        tokenizer: a tokenizer.json.
        texts: how texts are laid out.
        name: for people.

    Raises:
        ExportError: a tokenizer that llama.cpp does not have, or a weight that the precision cannot hold.
    """
    gguf = import_gguf()
    # llama.cpp drops a layer's attention, too, where its feed-forward length is 0: such a layer gets an MLP of zeros
    decoder = fill_missing_parts(decoder, mlp=True)
    for theirs, ours in family.hf_names(decoder).items():
        check_gguf_range(dict(decoder.named_parameters())[ours], precision, name=theirs)
    vocabulary = GgufVocabulary.read(tokenizer, size=family.vocab_size)
    writer = gguf.GGUFWriter(path, "deci" if len(set(decoder.config.blocks)) > 1 else "llama")
    try:
        add_sizes(writer, decoder.config)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, vocabulary, texts)
        rows = list(named_tensors(decoder))
        for label, value in rows:
            kind = storage_type(value, precision)
            size = int(np.prod(gguf.quants.quant_shape_to_byte_shape(tuple(value.shape), kind)))
            writer.add_tensor_info(label, tuple(value.shape), np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for label, value in rows:
            data = permute_rotary_rows(label, value, decoder.config).detach().float().cpu().numpy()
            writer.write_tensor_data(gguf.quants.quantize(data, storage_type(value, precision)))
    finally:
        writer.close()


def add_sizes(writer: Any, config: DecoderConfig) -> None:
    """What llama.cpp builds the model from; one number where all layers have it, else one a layer."""
    gguf = import_gguf()

    def by_layer(field: str) -> int | list[int]:
        values = [getattr(block, field) for block in config.blocks]
        return values[0] if len(set(config.blocks)) == 1 else values

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.blocks))
    writer.add_head_count(by_layer("num_heads"))
    writer.add_head_count_kv(by_layer("num_kv_groups"))
    writer.add_feed_forward_length(by_layer("mlp_width"))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if isinstance(config.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary, texts: TextFormat) -> None:
    """The tokenizer, by which a text starts as its tokenizer.json says."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.leading_space)
    writer.add_bos_token_id(texts.begin)
    writer.add_eos_token_id(texts.end)
    if texts.turn_end is not None:
        writer.add_eot_token_id(texts.turn_end)
    if texts.pad is not None:
        writer.add_pad_token_id(texts.pad)
    writer.add_add_bos_token(texts.adds_begin)
    writer.add_add_eos_token(False)
    if texts.chat_templates:
        named = [{"name": name, "template": template} for name, template in texts.chat_templates.items()]
        writer.add_chat_template(named)


def named_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Names in the file, and our tensors."""
    for ours, value in decoder.named_parameters():
        yield gguf_name(ours), value
    factors = frequency_factors(decoder.config)
    if factors is not None:
        yield FACTORS, factors


def gguf_name(ours: str) -> str:
    """llama.cpp's name of a parameter."""
    module, _, kind = ours.rpartition(".")
    if not module.startswith("blocks."):
        return f"{OUTER[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{BLOCK[module]}.{kind}"


def frequency_factors(config: DecoderConfig) -> Tensor | None:
    """What the scaling of Llama 3.1 divides each frequency by, (E/2,)."""
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies / config.rope_scaling.stretch(frequencies, theta=config.rope_theta)


def permute_rotary_rows(label: str, value: Tensor, config: DecoderConfig, *, back: bool = False) -> Tensor:
    """Rows of queries and keys as llama.cpp turns them: pairs side by side, not half a head apart; or back."""
    if not label.endswith(("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")):
        return value
    half = config.head_dim // 2
    shape = (-1, half, 2) if back else (-1, 2, half)
    return value.unflatten(0, shape).transpose(1, 2).flatten(0, 2)


def storage_type(value: Tensor, precision: Precision) -> Any:
    """The type of a tensor in the file."""
    kinds = import_gguf().GGMLQuantizationType
    if value.ndim == 1:
        return kinds.F32
    if precision == "q8_0" and value.shape[-1] % import_gguf().GGML_QUANT_SIZES[kinds.Q8_0][0]:
        return kinds.F16
    return kinds[precision.upper()]


def check_gguf_range(value: Tensor, precision: Precision, *, name: str) -> None:
    """Raise ExportError where a weight is not finite, or too large for its type in the file."""
    kinds = import_gguf().GGMLQuantizationType
    kind = storage_type(value, precision)
    half = torch.finfo(torch.float16).max
    bounds = {kinds.F16: ("float16", half), kinds.Q8_0: ("q8_0", half * 127), kinds.BF16: ("bfloat16", BFLOAT16)}
    weight_range.check_weight_range(value, *bounds.get(kind, ("float32", torch.finfo(torch.float32).max)), name=name)


def read_gguf(path: Path, family: Family) -> Decoder:
    """The model of a file that `write_gguf` wrote, in float32, built from the file's own sizes.

    Raises:
        ExportError: a tensor that is absent, left over, or of another shape.
    """
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)

    def said(key: str) -> Any:
        return reader.get_field(key).contents()

    kind = said("general.architecture")
    layers = said(f"{kind}.block_count")

    def by_layer(key: str) -> list[int]:
        value = said(f"{kind}.{key}")
        return value if isinstance(value, list) else [value] * layers

    blocks = zip(
        by_layer("attention.head_count"), by_layer("attention.head_count_kv"), by_layer("feed_forward_length"),
        strict=True,
    )  # fmt: skip
    config = replace(
        family.decoder_config(),
        hidden_size=said(f"{kind}.embedding_length"),
        head_dim=said(f"{kind}.attention.key_length"),
        context_length=said(f"{kind}.context_length"),
        vocab_size=len(said("tokenizer.ggml.tokens")),
        rope_theta=said(f"{kind}.rope.freq_base"),
        norm_eps=said(f"{kind}.attention.layer_norm_rms_epsilon"),
        blocks=tuple(BlockConfig(*sizes) for sizes in blocks),
    )
    decoder = Decoder.empty(config)
    wanted = {gguf_name(ours): parameter for ours, parameter in decoder.named_parameters()}
    found = {tensor.name: tensor for tensor in reader.tensors}
    if set(found) - {FACTORS} != set(wanted):
        raise ExportError(f"export: {path.name} holds {sorted(set(found) ^ set(wanted))[0]}, or lacks it")
    with torch.no_grad():
        for label, parameter in wanted.items():
            value = torch.from_numpy(gguf.quants.dequantize(found[label].data, found[label].tensor_type).copy())
            if value.shape != parameter.shape:
                raise ExportError(f"export: {label} of {path.name} has shape {tuple(value.shape)}")
            parameter.copy_(permute_rotary_rows(label, value, config, back=True))
    return decoder
