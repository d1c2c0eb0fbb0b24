"""The base class of model families: sizes from YAML or a Hugging Face config.json, and the names of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from nestlm.errors import CheckpointError, ConfigError
from nestlm.model import config_json, hub
from nestlm.model.checkpoint import (
    TensorHeader,
    check_tensors,
    path_in_checkpoint,
    read_headers,
    read_hf_config,
    read_tensors,
    tensors_equal,
)
from nestlm.model.parent_files import TOKENIZER_JSON, ParentFiles
from nestlm.model.rope_config import read_rotary, write_rotary
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.nn.rope import RopeScaling

MOST_LAYERS = 1000  # accepted from a config.json; more would take minutes to price
# Keys of features that no family supports; null, false, 0 and empty values mean that a feature is not used.
UNSUPPORTED = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "quantized weights",
}

# Hugging Face module names by nestlm's names. All families that transformers derives from Llama share them.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
OUTER_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """One size of a model family. Its fields are set by YAML, or read from a config.json.

    Attributes:
        weights: a Hugging Face checkpoint: a folder, or a hub's OWNER/NAME or OWNER/NAME@REVISION; None without one.
        init: `random` allows training from scratch; None does not.
        pretraining_tokens: number of tokens that the weights were trained on; None if unknown.
        vocab_size: vocabulary size, V.
        hidden_size: width of the residual stream, D.
        num_layers: number of blocks, N.
        num_heads: number of query heads of a block.
        num_kv_groups: number of key and value heads of a block.
        head_dim: entries of a head.
        mlp_width: hidden units of an MLP.
        context_length: longest rows that the model takes, L.
        rope_theta: base of the rotary embeddings.
        rope_scaling: scaling of the rotary embeddings; None without scaling.
        norm_eps: epsilon of the norms.
        tie_embeddings: whether the output head shares the embedding's weights.
    """

    model_type: ClassVar[str]  # the `model_type` in config.json
    architecture: ClassVar[str]  # transformers' class
    activation: ClassVar[Literal["silu", "relu2"]]  # of the MLP
    norm_eps_key: ClassVar[str]
    default_norm_eps: ClassVar[float]
    knows_windows: ClassVar[bool] = False  # whether layers of transformers' class can use a sliding window
    heads_divide_hidden_size: ClassVar[bool] = False  # whether transformers' class requires it

    weights: str | None
    init: str | None
    pretraining_tokens: float | None
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_groups: int
    head_dim: int
    mlp_width: int
    context_length: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tie_embeddings: bool

    @classmethod
    @abstractmethod
    def parse_own_keys(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields that only this family has from a config.json.

        Raises:
            CheckpointError: the config has a feature that the family's decoder does not support.
        """

    @abstractmethod
    def make_own_keys(self) -> dict[str, Any]:
        """Build the keys of a config.json from which `parse_own_keys` reads the same values."""

    @abstractmethod
    def decoder_features(self) -> dict[str, Any]:
        """Return the fields of `DecoderConfig` that describe the family's layers, such as biases and norms."""

    @classmethod
    def sliding_window(cls, config: Mapping[str, Any]) -> int | None:
        """Read the size of the sliding window, in tokens, from a config.json; None if no layer uses a window."""
        return None

    @classmethod
    def unused_window_keys(cls, config: Mapping[str, Any]) -> set[str]:
        """Return the config.json's keys about windows that the family's layers ignore but transformers' cache obeys."""
        if cls.knows_windows:
            return set()
        is_sliding = "sliding_attention" in (config.get("layer_types") or ())
        kinds = {"layer_types"} if is_sliding else set[str]()
        return kinds | ({"sliding_window"} if config.get("sliding_window") is not None else set())

    @classmethod
    def parse_hf_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields of this class from a config.json.

        Raises:
            CheckpointError: a size is missing or invalid, or the config has a feature that is not supported.
        """
        config_json.check_supported_value(config, "hidden_act", cls.activation)
        theta, scaling = read_rotary(config)
        hidden_size, heads = (
            config_json.read_size(config, "hidden_size"),
            config_json.read_size(config, "num_attention_heads"),
        )
        return {
            "vocab_size": config_json.read_size(config, "vocab_size"),
            "hidden_size": hidden_size,
            "num_layers": config_json.read_size(config, "num_hidden_layers", most=MOST_LAYERS),
            "num_heads": heads,
            "num_kv_groups": config_json.read_size(config, "num_key_value_heads", default=heads),
            "head_dim": config_json.read_size(config, "head_dim", default=hidden_size // heads),
            "mlp_width": config_json.read_size(config, "intermediate_size"),
            "context_length": config_json.read_size(config, "max_position_embeddings"),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": config_json.read_number(config, cls.norm_eps_key, default=cls.default_norm_eps),
            "tie_embeddings": config_json.read_flag(config, "tie_word_embeddings"),
            **cls.parse_own_keys(config),
        }

    def make_hf_config(self) -> dict[str, Any]:
        """Build the config.json of this size, which `parse_hf_config` and transformers can read."""
        sizes = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_groups,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_width,
            "hidden_act": self.activation,
            "max_position_embeddings": self.context_length,
            "rope_parameters": write_rotary(self.rope_theta, self.rope_scaling),
            self.norm_eps_key: self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
        }
        return sizes | self.make_own_keys()

    def decoder_config(self) -> DecoderConfig:
        """Build the configuration of the decoder, whose blocks all have attention and an MLP.

        Raises:
            ConfigError: a size that is not positive, or sizes that do not fit together.
        """
        block = BlockConfig(self.num_heads, self.num_kv_groups, self.mlp_width)
        for name, size in asdict(block).items():
            if size <= 0:
                raise ConfigError(f"model.{name}: got {size}, wanted a positive size")
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            context_length=self.context_length,
            blocks=(block,) * max(0, self.num_layers),
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            norm_eps=self.norm_eps,
            tie_embeddings=self.tie_embeddings,
            activation=self.activation,
            **self.decoder_features(),
        )

    def __post_init__(self) -> None:
        if self.init not in (None, "random"):
            raise ConfigError(f"model.init: got {self.init!r}, wanted 'random' or null")
        self.decoder_config()
        readable = self.parse_hf_config(self.make_hf_config())
        for name, known in readable.items():  # a field that config.json cannot express must have its only value
            if getattr(self, name) != known:
                raise ConfigError(f"model.{name}: got {getattr(self, name)}, but {self.model_type} has {known} only")

    @property
    def weights_folder(self) -> Path:
        """The folder of the complete checkpoint; a hub's repository is downloaded first."""
        assert self.weights is not None, "there are no weights"
        return hub.fetch_all_files(self.weights)

    @property
    def tokenizer_file(self) -> Path | None:
        """The path of the checkpoint's tokenizer.json, which may be missing; None without weights."""
        return None if self.weights is None else path_in_checkpoint(hub.fetch_small_files(self.weights), TOKENIZER_JSON)

    def check_weights(self, *, dry_run: bool) -> None:
        """Check before a run that the weights suit, or that the model may be trained from scratch.

        For a folder, config.json and the headers of all weights are compared with this size. For a hub's repository,
        only config.json is, because the run downloads the weights later.

        Args:
            dry_run: allow a size without weights.

        Raises:
            CheckpointError: the weights do not suit.
            ConfigError: there are no weights, and `init` is not `random`.
        """
        if self.weights is not None:
            folder = hub.fetch_small_files(self.weights)
            self.check_config(read_hf_config(folder))
            if Path(self.weights).is_dir():
                self.check_headers()
        elif self.init is None and not dry_run:
            raise ConfigError(
                "model.weights: this size has none; give a folder with model.weights=FOLDER, "
                "or train from scratch with model.init=random"
            )

    def check_headers(self) -> None:
        """Compare the headers of the weights with this size. Raises CheckpointError for a difference.

        If the files hold a tied head besides the embedding, the values of both are compared.
        """
        stored, decoder = read_headers(self.weights_folder), Decoder.on_meta(self.decoder_config())
        shapes = {name: value.shape for name, value in decoder.named_parameters()}
        check_tensors(stored, shapes, **self.match_names(stored, decoder))
        if self.tie_embeddings and {HEAD, EMBEDDING} <= set(stored) and not tensors_equal(stored, HEAD, EMBEDDING):
            raise CheckpointError(
                f"model.weights: {HEAD} differs from {EMBEDDING}, though tie_word_embeddings is true in config.json; "
                "transformers keeps both: set tie_word_embeddings to false there"
            )

    def read_parent_files(self) -> ParentFiles | None:
        """Read the files of the checkpoint that exports copy; None without weights."""
        if self.weights is None:
            return None
        return ParentFiles.from_checkpoint(
            self.weights_folder, repository=None if Path(self.weights).is_dir() else self.weights
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Compare a config.json with this size. Raises CheckpointError for another family, size or feature."""
        if config.get("model_type") != self.model_type:
            kind = config_json.quote(config.get("model_type"))
            raise CheckpointError(
                f"model.weights: model_type is {kind} in config.json, the chosen size is of {self.model_type!r}; "
                "try model=pretrained"
            )
        self.check_supported(config, context_length=self.context_length)
        for name, theirs in self.parse_hf_config(config).items():
            ours = getattr(self, name)
            if name == "context_length":
                if theirs < ours:
                    raise CheckpointError(f"model.{name}: got {ours}, wanted at most the checkpoint's {theirs}")
            elif theirs != ours:
                raise CheckpointError(
                    f"model.{name}: config.json of model.weights says {theirs}, the chosen size says {ours}; "
                    "model=pretrained takes the folder's sizes"
                )

    def load_weights(self, decoder: Decoder) -> None:
        """Load the weights into a decoder of this size, one shard at a time.

        Raises:
            CheckpointError: a tensor is missing, damaged, unexpected or of another shape.
        """
        names = self.match_names(read_headers(self.weights_folder), decoder)
        read_tensors(self.weights_folder, dict(decoder.named_parameters()), **names)

    def match_names(self, stored: Mapping[str, TensorHeader], decoder: Decoder) -> dict[str, Any]:
        """Return the arguments `names` and `ignored` of `check_tensors` and `read_tensors` for a checkpoint.

        If head and embedding are tied, the checkpoint may hold either or both.
        """
        names = self.hf_names(decoder)
        if not self.tie_embeddings:
            return {"names": names, "ignored": set[str]()}
        if HEAD in stored and EMBEDDING not in stored:
            names[HEAD] = names.pop(EMBEDDING)
        return {"names": names, "ignored": {HEAD} - set(names)}

    @staticmethod
    def hf_names(decoder: Decoder) -> dict[str, str]:
        """Return nestlm's name of every parameter of a decoder by its Hugging Face name."""
        names = {}
        for ours in dict(decoder.named_parameters()):
            module, _, kind = ours.rpartition(".")
            if module.startswith("blocks."):
                _, layer, module = module.split(".", 2)
                names[f"model.layers.{layer}.{BLOCK_NAMES[module]}.{kind}"] = ours
            else:
                names[f"{OUTER_NAMES[module]}.{kind}"] = ours
        return names

    @classmethod
    def from_hf_config(cls, weights: str, config: Mapping[str, Any], **changes: Any) -> Self:
        """Build the size that a config.json describes.

        Args:
            weights: the checkpoint, which becomes the field `weights`.
            config: its config.json.
            changes: values of fields that replace those of the config; None keeps the config's.

        Raises:
            CheckpointError: the config lacks a size, or has a feature that is not supported.
        """
        known = cls.parse_hf_config(config) | {name: value for name, value in changes.items() if value is not None}
        cls.check_supported(config, context_length=known["context_length"])
        rest = {field.name: None for field in fields(cls) if field.name not in known}
        values: dict[str, Any] = {**rest, **known, "weights": weights}
        return cls(**values)

    @classmethod
    def check_supported(cls, config: Mapping[str, Any], *, context_length: int) -> None:
        """Check that a config.json has no feature that nestlm does not support. Raises CheckpointError, naming it.

        Args:
            config: the config.json.
            context_length: longest rows; a sliding window that is not shorter has no effect and is accepted.
        """
        for name, what in UNSUPPORTED.items():
            if config.get(name):
                shown = config_json.quote(config[name])
                raise CheckpointError(f"model.weights: {name} is {shown} in config.json: {what} is not supported")
        kinds = config.get("layer_types") or []
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise config_json.wrong_value_error("layer_types", kinds, "a list of names")
        window = cls.sliding_window(config)
        if window is not None and window < context_length:
            raise CheckpointError(
                f"model.weights: a sliding window of {window} tokens is not supported; rows of at most {window} do not "
                f"use it: set model.context_length={window}"
            )
        others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if others:
            raise CheckpointError(f"model.weights: layers of type {config_json.quote(others[0])} are not supported")
