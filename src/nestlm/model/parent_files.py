"""What travels from a parent's folder into exports: settings, tokenizer and chat templates; never its code.

The list says what belongs to an export. Whatever else lies beside a checkpoint stays behind: adapters, indices of other
weights, images, Python files. Keys of JSON files that lead transformers to code are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from nestlm.errors import CheckpointError
from nestlm.model.checkpoint import path_in_checkpoint, read_headers, read_json_object
from nestlm.model.hub import HUB_ID

CONFIG, GENERATION, TOKENIZER_JSON = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
# Files of a tokenizer: objects, which may lead to code, and those that hold nothing but tokens or a template.
TOKENIZER_OBJECTS = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.json")
TOKENIZER_PLAIN = (
    TOKENIZER_JSON, "added_tokens.json", TEMPLATE, "merges.txt", "tokenizer.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip
# What leads transformers to code, or to files that stay behind.
CODE_KEYS = frozenset({
    "auto_map", "attn_implementation", "code_revision", "custom_generate", "custom_pipeline", "custom_pipelines",
    "experts_implementation", "fast_tokenizer_files", "kernel_config", "trust_remote_code", "use_kernels",
    "_attn_implementation", "_attn_implementation_internal", "_experts_implementation",
    "_experts_implementation_internal",
})  # fmt: skip
FACTS = "parent.json"  # of a folder that `Parent.write` fills
MOST_TEMPLATES = 100


@dataclass(frozen=True)
class ParentFiles:
    """The small files that exports take from a checkpoint, and the dtypes of its tensors.

    Attributes:
        files: contents, by path relative to the folder, without keys that lead to code.
        dtypes: by name of a tensor, as safetensors names them.
        repository: where it is on the hub; None: it is a folder on disk.
    """

    files: Mapping[str, bytes]
    dtypes: Mapping[str, str]
    repository: str | None = None

    @classmethod
    def from_checkpoint(cls, folder: Path, *, repository: str | None = None) -> ParentFiles:
        """Read a checkpoint folder. Raises CheckpointError for a damaged file, or a link out of the folder."""
        return cls(
            read_small_files(folder), {name: tensor.dtype for name, tensor in read_headers(folder).items()}, repository
        )

    @classmethod
    def read(cls, folder: Path) -> ParentFiles:
        """Read what `write` wrote. Raises CheckpointError for a damaged file, or a link out of the folder."""
        facts = read_json_object(folder, FACTS)
        dtypes, repository = facts.get("dtypes"), facts.get("repository")
        is_named = repository is None or (isinstance(repository, str) and HUB_ID.fullmatch(repository))
        if not isinstance(dtypes, dict) or not is_named:
            raise CheckpointError(f"model.weights: {folder / FACTS} is damaged; copy the run again, or do it again")
        return cls(read_small_files(folder), dtypes, repository)

    def write(self, folder: Path) -> None:
        """Write all of it into a folder, which is made where it is absent."""
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, self.files)
        (folder / FACTS).write_bytes(to_json({"repository": self.repository, "dtypes": self.dtypes}))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json."""
        return self.object(CONFIG)

    def object(self, name: str) -> dict[str, Any]:
        """A JSON file's content; empty where there is none."""
        return json.loads(self.files[name]) if name in self.files else {}

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The files that belong to the tokenizer, chat templates among them."""
        return {name: content for name, content in self.files.items() if name not in (CONFIG, GENERATION)}

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name, as transformers finds them; the one for conversations is `default`.

        Files come before those within tokenizer_config.json, those before the older chat_template.json.
        """
        found = {
            "default" if name == TEMPLATE else PurePosixPath(name).stem: content.decode("utf-8", "replace")
            for name, content in self.files.items()
            if name.endswith(".jinja")
        }
        for name in (TOKENIZER_CONFIG, "chat_template.json"):
            said = self.object(name).get("chat_template")
            pairs = said if isinstance(said, list) else [{"name": "default", "template": said}]
            for pair in [] if found else pairs:
                if (
                    isinstance(pair, dict)
                    and isinstance(pair.get("name"), str)
                    and isinstance(pair.get("template"), str)
                ):
                    found[pair["name"]] = pair["template"]
        return found

    def token(self, name: str) -> str | None:
        """The text of a special token, such as `pad_token`; None where no file names one."""
        for file in (TOKENIZER_CONFIG, "special_tokens_map.json"):
            said = self.object(file).get(name)
            text = said.get("content") if isinstance(said, dict) else said
            if isinstance(text, str):
                return text
        return None


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a checkpoint folder that travel, by relative path, without keys that lead to code."""
    files = {}
    for name in (CONFIG, GENERATION, *TOKENIZER_OBJECTS):
        path = path_in_checkpoint(folder, name)
        if path.is_file():
            content = read_json_object(folder, name)
            known = drop_code_keys(content)
            files[name] = path.read_bytes() if known == content else to_json(known)
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
    """Write contents into a folder, by relative path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def drop_code_keys(value: Any) -> Any:
    """A JSON value without the keys that lead transformers to code, at any depth."""
    if isinstance(value, dict):
        return {key: drop_code_keys(each) for key, each in value.items() if key not in CODE_KEYS}
    return [drop_code_keys(each) for each in value] if isinstance(value, list) else value


def to_json(value: Any) -> bytes:
    """A JSON file as transformers lays it out."""
    return (json.dumps(value, indent=2) + "\n").encode()
