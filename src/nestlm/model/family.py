"""What a model family is: sizes, read from a config.json of Hugging Face or from YAML, and the names of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from nestlm.errors import CheckpointError, ConfigError
from nestlm.model import config_json, hub
from nestlm.model.checkpoint import (
    TensorHeader,
    check_tensors,
    path_in_checkpoint,
    read_config,
    read_headers,
    read_tensors,
    tensors_equal,
)
from nestlm.model.parent_files import TOKENIZER_JSON, ParentFiles
from nestlm.model.rope_config import read_rotary, write_rotary
from nestlm.nn.config import BlockConfig, DecoderConfig
from nestlm.nn.decoder import Decoder
from nestlm.nn.rope import RopeScaling

MOST_LAYERS = 1000  # of a config.json: more would take minutes to price
# Features of a config.json that none of our families has; absent, null, false, 0 and empty mean "not used".
UNSUPPORTED = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "quantized weights",
}


# Names of modules, ours to theirs: all families that transformers derives from Llama share them.
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
    """A named size of a family: its fields are what YAML and `config.json` say.

    Attributes:
        weights: a Hugging Face checkpoint: a folder, or a hub's OWNER/NAME or OWNER/NAME@REVISION; None where there is
            none.
        init: `random` where the model may be trained from scratch.
        pretraining_tokens: tokens that given weights were trained on, where known.
        context_length: longest rows that the model takes, L.
        rope_scaling: how rotary positions are stretched; None: not at all.
        tie_embeddings: whether the head is the embedding.
    """

    model_type: ClassVar[str]  # in config.json
    architecture: ClassVar[str]  # the class in transformers
    activation: ClassVar[Literal["silu", "relu2"]]  # of the MLP
    norm_eps_key: ClassVar[str]
    default_norm_eps: ClassVar[float]
    knows_windows: ClassVar[bool] = False  # whether layers of transformers' class can use a sliding window
    heads_divide_hidden_size: ClassVar[bool] = False  # transformers' class wants it, whatever the head width

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
        """The fields that only this family has, from a config.json.

        Raises:
            CheckpointError: it has what the family's decoder does not compute.
        """

    @abstractmethod
    def make_own_keys(self) -> dict[str, Any]:
        """The keys of a config.json that `read_own` reads."""

    @abstractmethod
    def features(self) -> dict[str, Any]:
        """What the family's layers compute, fields of `DecoderConfig`."""

    @classmethod
    def window(cls, config: Mapping[str, Any]) -> int | None:
        """Tokens of the sliding window that some layer uses, from a config.json; None where no layer uses one."""
        return None

    @classmethod
    def unused_keys(cls, config: Mapping[str, Any]) -> set[str]:
        """Keys of a window that the family's layers do not know, but transformers' cache would go by."""
        if cls.knows_windows:
            return set()
        is_sliding = "sliding_attention" in (config.get("layer_types") or ())
        kinds = {"layer_types"} if is_sliding else set[str]()
        return kinds | ({"sliding_window"} if config.get("sliding_window") is not None else set())

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields from a config.json.

        Raises:
            CheckpointError: it lacks a size, or has what the family's decoder does not compute.
        """
        config_json.check_value(config, "hidden_act", cls.activation)
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

    def write(self) -> dict[str, Any]:
        """The config.json of this size: what `read` reads, and transformers opens."""
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
        """Sizes of the decoder."""
        block = BlockConfig(self.num_heads, self.num_kv_groups, self.mlp_width)
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
            **self.features(),
        )

    def __post_init__(self) -> None:
        if self.init not in (None, "random"):
            raise ConfigError(f"model.init: got {self.init!r}, wanted 'random' or null")
        self.decoder_config()
        for name, known in self.read(self.write()).items():  # what the family has no word for is not its own
            if getattr(self, name) != known:
                raise ConfigError(f"model.{name}: got {getattr(self, name)}, but {self.model_type} has {known} only")

    @property
    def folder(self) -> Path:
        """The folder of the weights, all files in it."""
        assert self.weights is not None, "there is no folder"
        return hub.fetch_all_files(self.weights)

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that belongs to the weights."""
        return None if self.weights is None else path_in_checkpoint(hub.fetch_small_files(self.weights), TOKENIZER_JSON)

    def check_weights(self, *, dry_run: bool) -> None:
        """Raise when weights don't suit, or there are neither weights nor leave to train from scratch.

        Of a folder on disk, all files are looked at, of the weights their headers; of a hub's repository those that are
        small, since the others are fetched by the run.
        """
        if self.weights is not None:
            folder = hub.fetch_small_files(self.weights)
            self.check_config(read_config(folder))
            if Path(self.weights).is_dir():
                self.check_headers()
        elif self.init is None and not dry_run:
            raise ConfigError(
                "model.weights: this size has none; give a folder with model.weights=FOLDER, "
                "or train from scratch with model.init=random"
            )

    def check_headers(self) -> None:
        """Raise CheckpointError when the tensors of `weights` are not those of this size; their headers are read.

        A tied head that the files hold besides is compared with the embedding, number by number.
        """
        stored, decoder = read_headers(self.folder), Decoder.on_meta(self.decoder_config())
        shapes = {name: value.shape for name, value in decoder.named_parameters()}
        check_tensors(stored, shapes, **self.match_names(stored, decoder))
        if self.tie_embeddings and {HEAD, EMBEDDING} <= set(stored) and not tensors_equal(stored, HEAD, EMBEDDING):
            raise CheckpointError(
                f"model.weights: {HEAD} differs from {EMBEDDING}, though tie_word_embeddings is true in config.json; "
                "transformers keeps both: set tie_word_embeddings to false there"
            )

    def parent(self) -> ParentFiles | None:
        """What exports take from the folder of `weights`; None where there is none."""
        if self.weights is None:
            return None
        return ParentFiles.from_checkpoint(
            self.folder, repository=None if Path(self.weights).is_dir() else self.weights
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError when the config.json of `weights` is another size, or computes something else."""
        if config.get("model_type") != self.model_type:
            kind = config_json.quote(config.get("model_type"))
            raise CheckpointError(
                f"model.weights: model_type is {kind} in config.json, the chosen size is of {self.model_type!r}; "
                "try model=pretrained"
            )
        self.check_features(config, context_length=self.context_length)
        for name, theirs in self.read(config).items():
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
        """Fill a decoder from `weights`, one shard at a time.

        Raises:
            CheckpointError: missing, damaged, left-over or wrongly shaped tensors.
        """
        names = self.match_names(read_headers(self.folder), decoder)
        read_tensors(self.folder, dict(decoder.named_parameters()), **names)

    def match_names(self, stored: Mapping[str, TensorHeader], decoder: Decoder) -> dict[str, Any]:
        """How a checkpoint names a decoder's parameters, and what it may hold besides: `names` and `ignored`.

        Of a tied head and embedding, either is enough.
        """
        names = self.hf_names(decoder)
        if not self.tie_embeddings:
            return {"names": names, "ignored": set[str]()}
        if HEAD in stored and EMBEDDING not in stored:
            names[HEAD] = names.pop(EMBEDDING)
        return {"names": names, "ignored": {HEAD} - set(names)}

    @staticmethod
    def hf_names(decoder: Decoder) -> dict[str, str]:
        """Hugging Face name of every parameter: theirs to ours."""
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
    def from_config(cls, weights: str, config: Mapping[str, Any], **changes: Any) -> Self:
        """The size that a config.json names. Raises CheckpointError where it names none."""
        known = cls.read(config) | {name: value for name, value in changes.items() if value is not None}
        cls.check_features(config, context_length=known["context_length"])
        rest = {field.name: None for field in fields(cls) if field.name not in known}
        values: dict[str, Any] = {**rest, **known, "weights": weights}
        return cls(**values)

    @classmethod
    def check_features(cls, config: Mapping[str, Any], *, context_length: int) -> None:
        """Raise CheckpointError, naming it, where a config.json has a feature that no family computes."""
        for name, what in UNSUPPORTED.items():
            if config.get(name):
                shown = config_json.quote(config[name])
                raise CheckpointError(f"model.weights: {name} is {shown} in config.json: {what} is not supported")
        kinds = config.get("layer_types") or []
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise config_json.wrong_value_error("layer_types", kinds, "a list of names")
        window = cls.window(config)
        if window is not None and window < context_length:
            raise CheckpointError(
                f"model.weights: a sliding window of {window} tokens is not supported; rows of at most {window} do not "
                f"use it: set model.context_length={window}"
            )
        others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if others:
            raise CheckpointError(f"model.weights: layers of type {config_json.quote(others[0])} are not supported")
