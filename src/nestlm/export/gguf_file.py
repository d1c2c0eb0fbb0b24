"""Write and read GGUF files, which llama.cpp runs.

Models of the Llama family with equal layers have llama.cpp's architecture `llama`, those with different layers `deci`.
"""

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
FAMILIES = ("llama", "mistral")  # model types that llama.cpp's architectures `llama` and `deci` compute
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
FACTORS = "rope_freqs.weight"  # tensor by which llama.cpp divides the frequencies of rotary positions


def import_gguf() -> Any:
    """Import the gguf package. Raises ExportError if it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ExportError("export: --format gguf needs the package gguf; pip install 'nestlm[gguf]'") from error


def check_family_fits(family: Family) -> None:
    """Raise ExportError if `write_gguf` cannot write a family or its rotary scaling, or gguf is not installed."""
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
    """Special tokens and chat templates of a model.

    Attributes:
        begin: id of the token before a text.
        end: id of the main token after a text.
        turn_end: id of another token that ends an answer; None: there is none.
        pad: id of the padding token; None: there is none.
        adds_begin: whether the tokenizer puts `begin` before a text.
        chat_templates: templates by name; `default` is the one for conversations.
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
    """Write a decoder and its tokenizer to a GGUF file, one tensor at a time.

    Args:
        decoder: a model of the family's size, or a stand-alone sub-network of it.
        family: a family that `check_family_fits` accepts.
        path: the file to write.
        precision: precision of matrices. With q8_0, a matrix with rows that blocks of q8_0 do not divide is stored in
            f16. Vectors are always stored in f32.
        tokenizer: path of a tokenizer.json.
        texts: special tokens and chat templates.
        name: name of the model for its readers.

    Raises:
        ExportError: llama.cpp cannot express the tokenizer, or a weight is outside the range of the precision.
    """
    gguf = import_gguf()
    # llama.cpp also drops the attention of a layer without an MLP, so such a layer gets an MLP of zeros
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
    """Add the sizes of the model to the file's header: one number if all layers are equal, else one for each layer."""
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
    """Add the tokenizer, its special tokens and chat templates to the file's header."""
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
    """Yield each tensor of the file with its name there: the decoder's parameters, then rotary factors if any."""
    for ours, value in decoder.named_parameters():
        yield gguf_name(ours), value
    factors = frequency_factors(decoder.config)
    if factors is not None:
        yield FACTORS, factors


def gguf_name(ours: str) -> str:
    """Translate a parameter's name in our decoder into llama.cpp's name."""
    module, _, kind = ours.rpartition(".")
    if not module.startswith("blocks."):
        return f"{OUTER[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{BLOCK[module]}.{kind}"


def frequency_factors(config: DecoderConfig) -> Tensor | None:
    """Compute by how much Llama 3.1's rotary scaling divides each frequency, (E/2,); None without that scaling."""
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies / config.rope_scaling.stretch(frequencies, theta=config.rope_theta)


def permute_rotary_rows(label: str, value: Tensor, config: DecoderConfig, *, back: bool = False) -> Tensor:
    """Permute the rows of a query or key projection between our order and llama.cpp's.

    Rotary embeddings rotate pairs of rows. Our pairs are half a head apart, llama.cpp's are neighbours.

    Args:
        label: the tensor's name in the file; tensors other than query and key projections are returned as they are.
        value: weight (rows, D) or bias (rows,).
        config: gives the head width.
        back: permute from llama.cpp's order to ours instead.
    """
    if not label.endswith(("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")):
        return value
    half = config.head_dim // 2
    shape = (-1, half, 2) if back else (-1, 2, half)
    return value.unflatten(0, shape).transpose(1, 2).flatten(0, 2)


def storage_type(value: Tensor, precision: Precision) -> Any:
    """Return the GGML type in which a tensor is stored: vectors in F32, matrices by the precision."""
    kinds = import_gguf().GGMLQuantizationType
    if value.ndim == 1:
        return kinds.F32
    if precision == "q8_0" and value.shape[-1] % import_gguf().GGML_QUANT_SIZES[kinds.Q8_0][0]:
        return kinds.F16
    return kinds[precision.upper()]


def check_gguf_range(value: Tensor, precision: Precision, *, name: str) -> None:
    """Raise ExportError if a weight is not finite, or too large for its type in the file."""
    kinds = import_gguf().GGMLQuantizationType
    kind = storage_type(value, precision)
    half = torch.finfo(torch.float16).max
    bounds = {kinds.F16: ("float16", half), kinds.Q8_0: ("q8_0", half * 127), kinds.BF16: ("bfloat16", BFLOAT16)}
    weight_range.check_weight_range(value, *bounds.get(kind, ("float32", torch.finfo(torch.float32).max)), name=name)


def read_gguf(path: Path, family: Family) -> Decoder:
    """Read a file that `write_gguf` wrote into a decoder in float32, with the sizes that the file states.

    Args:
        path: the file.
        family: the family of the model, for what the file does not state.

    Raises:
        ExportError: a tensor is missing, unknown, or of another shape than the sizes imply.
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
