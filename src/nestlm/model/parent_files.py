"""The small files of the parent checkpoint that exports copy: settings, tokenizer and chat templates, never code.

Only listed files are copied; adapters, indices of other weights, images and Python files are not. Keys of JSON files
that make transformers load code are removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from nestlm.errors import CheckpointError
from nestlm.model.checkpoint import path_in_checkpoint, read_checkpoint_json, read_headers
from nestlm.model.hub import HUB_ID
from nestlm.utils.json_files import to_json

CONFIG, GENERATION, TOKENIZER_JSON = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder with .jinja files
# Files of a tokenizer: JSON objects, which can name code, and files that hold only tokens or a template.
TOKENIZER_OBJECTS = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.json")
TOKENIZER_PLAIN = (
    TOKENIZER_JSON, "added_tokens.json", TEMPLATE, "merges.txt", "tokenizer.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip
# Keys that make transformers load code, or files that are not copied.
CODE_KEYS = frozenset({
    "auto_map", "attn_implementation", "code_revision", "custom_generate", "custom_pipeline", "custom_pipelines",
    "experts_implementation", "fast_tokenizer_files", "kernel_config", "trust_remote_code", "use_kernels",
    "_attn_implementation", "_attn_implementation_internal", "_experts_implementation",
    "_experts_implementation_internal",
})  # fmt: skip
FACTS = "parent.json"  # written by `ParentFiles.write`
MOST_TEMPLATES = 100


@dataclass(frozen=True)
class ParentFiles:
    """The small files that exports copy from the parent checkpoint, and the dtypes of its tensors.

    Attributes:
        files: contents by path relative to the folder, without keys that name code.
        dtypes: safetensors' dtype of each tensor, by Hugging Face name.
        repository: the checkpoint's name on the hub; None for a folder on disk.
    """

    files: Mapping[str, bytes]
    dtypes: Mapping[str, str]
    repository: str | None = None

    @classmethod
    def from_checkpoint(cls, folder: Path, *, repository: str | None = None) -> ParentFiles:
        """Read the files of a checkpoint. Raises CheckpointError for a damaged file, or a link out of the folder."""
        return cls(
            read_small_files(folder), {name: tensor.dtype for name, tensor in read_headers(folder).items()}, repository
        )

    @classmethod
    def read(cls, folder: Path) -> ParentFiles:
        """Read a folder that `write` wrote. Raises CheckpointError for a damaged file, or a link out of the folder."""
        facts = read_checkpoint_json(folder, FACTS)
        dtypes, repository = facts.get("dtypes"), facts.get("repository")
        is_named = repository is None or (isinstance(repository, str) and HUB_ID.fullmatch(repository))
        if not isinstance(dtypes, dict) or not is_named:
            raise CheckpointError(f"model.weights: {folder / FACTS} is damaged; copy the run again, or do it again")
        return cls(read_small_files(folder), dtypes, repository)

    def write(self, folder: Path) -> None:
        """Write the files and parent.json into a folder, which is created if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, self.files)
        (folder / FACTS).write_bytes(to_json({"repository": self.repository, "dtypes": self.dtypes}).encode())

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return self.read_json(CONFIG)

    def read_json(self, name: str) -> dict[str, Any]:
        """Parse one of the JSON files; returns an empty dictionary if it is not among the files."""
        return json.loads(self.files[name]) if name in self.files else {}

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the tokenizer, including chat templates, by path."""
        return {name: content for name, content in self.files.items() if name not in (CONFIG, GENERATION)}

    def chat_templates(self) -> dict[str, str]:
        """Collect the chat templates by name, with transformers' precedence; `default` is the one for conversations.

        .jinja files take precedence over tokenizer_config.json, and that over the older chat_template.json.
        """
        found = {
            "default" if name == TEMPLATE else PurePosixPath(name).stem: content.decode("utf-8", "replace")
            for name, content in self.files.items()
            if name.endswith(".jinja")
        }
        for name in (TOKENIZER_CONFIG, "chat_template.json"):
            value = self.read_json(name).get("chat_template")
            pairs = value if isinstance(value, list) else [{"name": "default", "template": value}]
            for pair in [] if found else pairs:
                if (
                    isinstance(pair, dict)
                    and isinstance(pair.get("name"), str)
                    and isinstance(pair.get("template"), str)
                ):
                    found[pair["name"]] = pair["template"]
        return found

    def special_token(self, name: str) -> str | None:
        """Return the text of a special token, such as `pad_token`, or None if no file names it."""
        for file in (TOKENIZER_CONFIG, "special_tokens_map.json"):
            value = self.read_json(file).get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                return text
        return None


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint folder that exports copy, by relative path, without keys that name code.

    Raises:
        CheckpointError: a file is damaged or a link out of the folder, or there are too many chat templates.
    """
    files = {}
    for name in (CONFIG, GENERATION, *TOKENIZER_OBJECTS):
        path = path_in_checkpoint(folder, name)
        if path.is_file():
            content = read_checkpoint_json(folder, name)
            kept = drop_code_keys(content)
            files[name] = path.read_bytes() if kept == content else to_json(kept).encode()
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    if len(templates) > MOST_TEMPLATES:
        raise CheckpointError(
            f"model.weights: {folder / TEMPLATES} holds {len(templates)} templates, wanted at most {MOST_TEMPLATES}"
        )
    for name in (*TOKENIZER_PLAIN, *(str(PurePosixPath(TEMPLATES, path.name)) for path in templates)):
        path = path_in_checkpoint(folder, name)
        if path.is_file():
            files[name] = path.read_bytes()
    return files


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into an existing folder.

    Args:
        folder: the folder.
        files: contents by relative path, with at most one subfolder.
    """
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def drop_code_keys(value: Any) -> Any:
    """Return a JSON value without the keys that make transformers load code, at any depth."""
    if isinstance(value, dict):
        return {key: drop_code_keys(each) for key, each in value.items() if key not in CODE_KEYS}
    return [drop_code_keys(each) for each in value] if isinstance(value, list) else value
