"""The tokens that begin and end texts: from settings, from a checkpoint's files, or by well-known names."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from nestlm.data.manifest import Manifest
from nestlm.data.preparation import NO_SETTINGS, prepare_source
from nestlm.data.prepared_data import PreparedData
from nestlm.data.sources.base import Document
from nestlm.data.sources.synthetic import Synthetic
from nestlm.data.special_tokens import SpecialTokens, SpecialTokenSettings, read_special_tokens
from nestlm.data.tokenizer import train_tokenizer
from nestlm.errors import DataError

NAMES = ("<one>", "<two>", "<|endoftext|>", "<|im_end|>")  # tokens 3 to 6


def tokenizer_of(*names: str, before: str | None = None) -> Tokenizer:
    """Build a tokenizer of letters with special tokens, one of which it may put before a text."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(names or NAMES))
    if before is not None:
        index = tokenizer.token_to_id(before)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A", special_tokens=[(before, index)]
        )
    return tokenizer


def write(folder: Path, **files: object) -> Path:
    """Write JSON files; names are given without the suffix."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


SOURCES = {
    "the tokenizer's files go before the model's": (
        {"tokenizer_config": {"bos_token": "<one>", "eos_token": "<two>"}, "config": {"bos_token_id": 4}},
        SpecialTokens(3, (4,)),
    ),
    "tokens with their properties": (
        {"tokenizer_config": {"bos_token": {"content": "<two>", "special": True}}, "config": {"eos_token_id": 3}},
        SpecialTokens(4, (3,)),
    ),
    "the older map goes first": (
        {"special_tokens_map": {"bos_token": "<two>"}, "tokenizer_config": {"bos_token": "<one>"}},
        SpecialTokens(4, (6,)),
    ),
    "unless the newer file lists the tokens": (
        {
            "special_tokens_map": {"bos_token": "<two>"},
            "tokenizer_config": {"bos_token": "<one>", "added_tokens_decoder": {}},
        },
        SpecialTokens(3, (6,)),
    ),
    "generation settings say what ends a text, the tokenizer which of it is the main end": (
        {
            "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"},
            "config": {"bos_token_id": 5, "eos_token_id": 3},
            "generation_config": {"eos_token_id": [5, 6, 900]},
        },
        SpecialTokens(5, (6, 5, 900)),
    ),
    "an ordinary token begins no text": ({"config": {"bos_token_id": 1, "eos_token_id": 2}}, SpecialTokens(5, (2,))),
    "a prepared folder keeps what was read": (
        {"manifest": {"begin": 3, "ends": [6, 5]}, "tokenizer_config": {"bos_token": "<two>"}},
        SpecialTokens(3, (6, 5)),
    ),
    "nothing is said": ({}, SpecialTokens(5, (6,))),
}


@pytest.mark.parametrize("case", SOURCES)
def test_what_files_say(case, tmp_path):
    files, wanted = SOURCES[case]
    assert read_special_tokens(tokenizer_of(), write(tmp_path, **files)) == wanted


def test_what_a_tokenizer_puts_before_a_text_begins_one(tmp_path):
    assert read_special_tokens(tokenizer_of(before="<two>"), tmp_path).begin == 4
    padded = tokenizer_of(before="<two>")
    padded.enable_padding(direction="left", length=8)
    padded.enable_truncation(1)
    assert read_special_tokens(padded, None).begin == 4
    write(tmp_path, tokenizer_config={"bos_token": "<one>"})
    with pytest.raises(DataError, match=r"bos_token is '<one>' .* puts '<two>' before a text; name .*begin_token"):
        read_special_tokens(tokenizer_of(before="<two>"), tmp_path)
    assert read_special_tokens(tokenizer_of(before="<two>"), tmp_path, begin="<one>").begin == 3


def test_named_tokens_go_before_all_else(tmp_path):
    write(tmp_path, tokenizer_config={"bos_token": "<one>", "eos_token": "<one>"}, config={"eos_token_id": 3})
    found = read_special_tokens(tokenizer_of(), tmp_path, begin="<two>", ends=["<|im_end|>", "<one>", "<|im_end|>"])
    assert found == SpecialTokens(4, (6, 3))
    assert found.stops == {3, 4, 6}
    with pytest.raises(DataError, match=r"data.begin_token: got '<six>', which the tokenizer lacks; it has <one>"):
        read_special_tokens(tokenizer_of(), tmp_path, begin="<six>")
    with pytest.raises(DataError, match=r"data.end_tokens: got '<six>'"):
        read_special_tokens(tokenizer_of(), tmp_path, ends=["<one>", "<six>"])


def test_a_tokenizer_without_a_known_name():
    unknown = tokenizer_of("<start>", "<end>")
    with pytest.raises(DataError, match=r"no file beside it names a bos_token.*name the token.*it has <start>, <end>"):
        read_special_tokens(unknown, None)
    assert read_special_tokens(unknown, None, ends=["<end>"]) == SpecialTokens(4, (4,)), "ends separate documents"
    assert read_special_tokens(unknown, None, begin="<start>") == SpecialTokens(3, (3,))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"bos_token": "<s>"}},
            r"bos_token is '<s>' in .*, which tokenizer.json lacks; name",
        ),
        ({"tokenizer_config": {"bos_token": 3}}, r"bos_token is 3 in .*, wanted a token's text"),
        ({"config": {"eos_token_id": "two"}}, r"eos_token_id is two in .*config.json, wanted a token's id"),
        ({"generation_config": {"eos_token_id": [1, True]}}, r"eos_token_id is \[1, True\]"),
        ({"tokenizer_config": [1]}, r"tokenizer_config.json holds a list, wanted an object"),
    ],
)
def test_files_that_say_nothing_useful_are_named(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_special_tokens(tokenizer_of(), write(tmp_path, **files))


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"bos_token": "\\'])
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"cannot read .*tokenizer_config.json .* mend it, or fetch it again"):
        read_special_tokens(tokenizer_of(), tmp_path)


def test_documents_begin_with_what_the_files_or_the_user_say(tmp_path):
    source, model = Synthetic(num_documents=60, num_words=60, seed=0), tmp_path / "model"
    model.mkdir()
    tokenizer = train_tokenizer((text for _, text in source.documents()), vocab_size=288)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    tokenizer.save(str(model / "tokenizer.json"))
    write(model, tokenizer_config={"bos_token": "<start>"}, generation_config={"eos_token_id": [289, 0]})
    for name, special, wanted in (
        ("by files", SpecialTokenSettings(), SpecialTokens(288, (289, 0))),
        ("named", SpecialTokenSettings("<end>", ["<start>"]), SpecialTokens(289, (288,))),
    ):
        out = tmp_path / name
        out.mkdir()
        prepare_source(
            source, out, vocab_size=None, tokenizer_file=model / "tokenizer.json", heldout_share=0.1, special=special
        )
        manifest = Manifest.read(out)
        assert manifest.special_token_ids == wanted
        assert (out / "validation-00000.bin").read_bytes()[:2] == wanted.begin.to_bytes(2, "little")
        assert read_special_tokens(tokenizer, out) == wanted, "also without the model's files"


@pytest.fixture
def chat(tmp_path) -> Path:
    """The path of a tokenizer.json of 290 tokens; the last two are special, and the first of these begins texts."""
    folder = tmp_path / "chat"
    folder.mkdir()
    tokenizer = train_tokenizer((text for _, text in CHATS.documents()), vocab_size=288)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config={"bos_token": "<start>", "eos_token": "<end>"})
    return folder / "tokenizer.json"


class Chats:
    """Texts with markup; every second one begins with the name of the begin token, as chat templates write it."""

    def documents(self):
        for number, (name, text) in enumerate(Synthetic(num_documents=60, num_words=60, seed=0).documents()):
            yield Document(name, f"<start>{text}<end>" if number % 2 else f"{text}<end>")


CHATS = Chats()


def prepared(folder: Path, tokenizer: Path, **options) -> tuple[Manifest, np.ndarray]:
    folder.mkdir(exist_ok=True)
    settings = {"vocab_size": None, "tokenizer_file": tokenizer, "heldout_share": 0.1}
    manifest = prepare_source(CHATS, folder, **settings | options)
    return manifest, np.fromfile(folder / "train-00000.bin", manifest.dtype)


def test_names_of_special_tokens_in_texts_are_special_tokens_where_that_is_asked_for(chat, tmp_path, capsys):
    manifest, tokens = prepared(tmp_path / "marked", chat, special=SpecialTokenSettings(in_text=True))
    documents = manifest.splits["train"].documents
    assert (tokens == 288).sum() == (tokens == 289).sum() == documents, "no document begins twice"
    assert capsys.readouterr().err == ""


def test_names_of_special_tokens_in_plain_texts_are_named_once(chat, tmp_path, capsys):
    manifest, tokens = prepared(tmp_path / "plain", chat)
    assert (tokens == 288).sum() == manifest.splits["train"].documents
    assert 289 not in tokens
    said = capsys.readouterr().err
    assert said.count("special tokens, taken as plain text") == 1
    assert "data: texts hold <end>: names of" in said
    assert "data.special_tokens=true (nestlm prepare --special-tokens)" in said
    with pytest.raises(DataError, match="was begun with special_tokens False, now it is True"):
        prepared(tmp_path / "plain", chat, special=SpecialTokenSettings(in_text=True))


def test_a_prepared_folder_is_used_with_the_special_tokens_that_it_was_made_with(chat, tmp_path):
    plain = tmp_path / "plain"
    prepared(plain, chat)
    opened = PreparedData.read(plain)
    options = {"vocab_size": 290, "tokenizer_file": chat}
    assert opened.with_model_tokens(special=SpecialTokenSettings(), **options).special_tokens == SpecialTokens(
        288, (289,)
    )
    named = opened.with_model_tokens(special=SpecialTokenSettings(ends=["<start>"]), **options)
    assert named.special_tokens == SpecialTokens(288, (288,)), "end tokens change no token of a text"
    with pytest.raises(DataError, match=r"begin with '<start>', wanted '<end>'; prepare it with --begin-token"):
        opened.with_model_tokens(special=SpecialTokenSettings("<end>"), **options)
    with pytest.raises(DataError, match=r"data.special_tokens: got true, but .*plain was prepared without"):
        opened.with_model_tokens(special=SpecialTokenSettings(in_text=True), **options)
    write(chat.parent, tokenizer_config={"bos_token": "<end>"})
    with pytest.raises(DataError, match=r"begin with '<start>', wanted '<end>'"):
        opened.with_model_tokens(special=SpecialTokenSettings(), **options)


def test_a_token_above_the_embedding_matters_where_a_text_holds_it(chat, tmp_path):
    """The tokenizer has 290 tokens, the model rows for 289."""
    manifest, _ = prepared(tmp_path / "unused", chat, vocab_size=289)
    assert manifest.vocab_size == 289
    marked = SpecialTokenSettings(in_text=True)
    message = r"holds '<end>', token 289, but the model has only 289 tokens"
    with pytest.raises(DataError, match=r"data: synthetic-00\d+ " + message):
        prepared(tmp_path / "used", chat, vocab_size=289, special=marked)
    prepared(tmp_path / "whole", chat, special=marked)
    opened = PreparedData.read(tmp_path / "whole")
    opened.with_model_tokens(vocab_size=290, tokenizer_file=None, special=NO_SETTINGS)
    with pytest.raises(DataError, match=r"data.path: .*whole " + message):
        opened.with_model_tokens(vocab_size=289, tokenizer_file=None, special=NO_SETTINGS)
    with pytest.raises(DataError, match=r"data.tokenizer: has 288 tokens, model.vocab_size is 287; wanted the"):
        prepared(tmp_path / "small", chat, vocab_size=287)
