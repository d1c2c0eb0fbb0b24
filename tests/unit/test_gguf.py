"""GGUF files: byte by byte through the gguf package's reader, and in llama_cpp.cpp where it is installed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exports import FAMILIES, Nest, nest, tokens
from howto import MLP_DROP
from models import AXES
from nestlm.data.sources.stdlib import Stdlib
from nestlm.data.tokenizer import load_tokenizer
from nestlm.data.tokenizer import train_tokenizer as train_tokenizer
from nestlm.elastic.surgery import extract
from nestlm.errors import ExportError
from nestlm.export import gguf_file, llama_cpp_process
from nestlm.export.gguf_vocabulary import CONTROL, SPLITS, GgufVocabulary
from nestlm.nn.decoder import Decoder

TEXTS = gguf_file.TextFormat(0, 0)
LLAMA3 = next(pattern for pattern, name in SPLITS.items() if name == "llama-bpe")
NEEDS_LLAMA = pytest.mark.skipif(
    llama_cpp_process.llama_cpp_version() is None, reason="llama-cpp-python is not installed: it compiles for minutes"
)


def prose() -> str:
    return "".join(text for _, (_, text) in zip(range(12), Stdlib().documents(), strict=False))


def written(nested: Nest, path: Path, *, case: str, precision: gguf_file.Precision = "f32") -> Decoder:
    small = extract(nested.decoder, nested.uneven(), axes=nested.axes)
    tokenizer = path.with_name("in") / "tokenizer.json"
    gguf_file.write_gguf(small, nested.family, path, precision=precision, tokenizer=tokenizer, texts=TEXTS, name=case)
    return small


def file_of(path: Path):
    return gguf_file.import_gguf().GGUFReader(path)


@pytest.mark.parametrize(
    "case", ["Llama 3", "Llama 3.1 (scaled positions)", "Llama, biases", "Llama, linear positions", "Mistral"]
)
def test_a_file_read_back_is_the_sub_network(case, tmp_path):
    nested = nest(case, tmp_path / "in", depth=True)
    small = written(nested, tmp_path / "model.gguf", case=case)
    back, reader = gguf_file.read_gguf(tmp_path / "model.gguf", nested.family), file_of(tmp_path / "model.gguf")
    assert back.config.blocks == small.config.blocks
    for name, parameter in small.named_parameters():
        assert torch.equal(dict(back.named_parameters())[name], parameter), name
    assert reader.get_field("general.architecture").contents() == "deci"
    assert reader.get_field("deci.feed_forward_length").contents() == [block.mlp_width for block in small.config.blocks]
    q = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight").data
    half = small.config.head_dim // 2
    ours = small.blocks[0].attn.q.weight.detach().numpy()
    assert np.array_equal(q[:2], ours[[0, half]]), "the two halves of a pair side by side"


@pytest.mark.parametrize("everywhere", [False, True], ids=["one MLP", "all MLPs"])
def test_a_dropped_mlp_is_written_as_zeros(everywhere, tmp_path):
    """llama.cpp would drop the attention of a layer without one: docs/howto/add-an-axis.md, whose axis this is."""
    nested = nest("Llama 3", tmp_path / "in")
    nested = replace(nested, axes=(MLP_DROP, AXES[1]))
    space, (tokenizer, path) = nested.space, (tmp_path / "in/tokenizer.json", tmp_path / "model.gguf")
    chosen = dict.fromkeys(space.sites, -1) | ({} if not everywhere else dict.fromkeys(space.axes["mlp_width"], 0))
    small = extract(nested.decoder, space.spec(chosen | {space.axes["mlp_width"][0]: 0}), axes=nested.axes)
    told = {"tokenizer": tokenizer, "texts": TEXTS, "name": "x"}
    gguf_file.write_gguf(small, nested.family, path, precision="f32", **told)
    back, x = gguf_file.read_gguf(path, nested.family), tokens(2, 40)
    assert [block.mlp_width for block in back.config.blocks] == [block.mlp_width or 32 for block in small.config.blocks]
    with torch.no_grad():
        assert torch.equal(back(x).logits_BLV, small(x).logits_BLV)
    lacking = sum(block.mlp_width == 0 for block in small.config.blocks)
    more = sum(p.numel() for p in back.parameters()) - sum(p.numel() for p in small.parameters())
    assert more == lacking * 97 * small.config.hidden_size, "as the page says"
    if llama_cpp_process.llama_cpp_version() is not None:
        found = torch.from_numpy(llama_cpp_process.llama_cpp_logits(path, x.numpy(), threads=1))
        assert float((found - small(x).logits_BLV).abs().max()) < 1e-3


def test_precisions_and_what_they_cost(tmp_path):
    nested = nest("Llama 3", tmp_path / "in")
    x, kinds, sizes, lost = tokens(2, 40), {}, {}, {}
    for precision in ("f32", "f16", "bf16", "q8_0"):
        path = tmp_path / f"{precision}.gguf"
        small = written(nested, path, case="x", precision=precision)
        with torch.no_grad():
            lost[precision] = float(
                (gguf_file.read_gguf(path, nested.family)(x).logits_BLV - small(x).logits_BLV).abs().max()
            )
        kinds[precision] = {tensor.name: tensor.tensor_type.name for tensor in file_of(path).tensors}
        sizes[precision] = path.stat().st_size
    assert lost["f32"] == 0.0 < lost["f16"] < lost["bf16"] < 1.0
    assert 0.0 < lost["q8_0"] < 1.0
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"]
    assert kinds["q8_0"]["token_embd.weight"] == "Q8_0"
    assert kinds["q8_0"]["blk.0.ffn_down.weight"] == "F16", "28 is no multiple of 32"
    assert {kinds[precision]["output_norm.weight"] for precision in kinds} == {"F32"}


def test_equal_widths_are_a_plain_llama(tmp_path):
    nested = nest("Llama 3.2 (tied)", tmp_path / "in")
    path = tmp_path / "model.gguf"
    gguf_file.write_gguf(
        nested.decoder,
        nested.family,
        path,
        precision="f32",
        tokenizer=tmp_path / "in/tokenizer.json",
        texts=TEXTS,
        name="x",
    )
    reader = file_of(path)
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    names = {tensor.name for tensor in reader.tensors}
    assert "output.weight" not in names, "tied"
    assert gguf_file.FACTORS in names


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "nemotron"])
def test_other_families_are_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ExportError, match=r"for the Llama family only, this is .*ForCausalLM; try --format hf"):
        gguf_file.check_family_fits(nest(FAMILIES[name], tmp_path).family)


def test_a_tensor_that_is_lost_is_named(tmp_path, monkeypatch):
    nested = nest("Llama 3", tmp_path / "in")
    whole = gguf_file.named_tensors
    monkeypatch.setattr(gguf_file, "named_tensors", lambda decoder: list(whole(decoder))[:-1])
    written(nested, tmp_path / "model.gguf", case="x")
    with pytest.raises(ExportError, match=r"model\.gguf holds output\.weight, or lacks it"):
        gguf_file.read_gguf(tmp_path / "model.gguf", nested.family)


def sentence_pieces(path: Path) -> Tokenizer:
    """A tokenizer such as Llama 2's: pieces of characters, bytes where there is none."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special[:3], show_progress=False)
    words = (word for line in prose().splitlines() for word in line.split(" "))
    tokenizer.train_from_iterator(words, trainer)
    data = json.loads(tokenizer.to_str())
    pieces = [piece for piece in data["model"]["vocab"] if piece not in special]
    data["model"]["vocab"] = {piece: index for index, piece in enumerate([*special, *pieces])}
    path.write_text(json.dumps(data))
    return load_tokenizer(path)


def byte_pairs(path: Path, *, pattern: str | None) -> Tokenizer:
    """A tokenizer such as ours, or such as Llama 3's, which splits texts by a pattern of its own."""
    tokenizer = train_tokenizer([prose()], vocab_size=600)
    if pattern is not None:
        data = json.loads(tokenizer.to_str())
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        data["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [step, data["pre_tokenizer"] | {"use_regex": False}],
        }
        data["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.save(str(path))
    return tokenizer


KINDS = {
    "sentence pieces": sentence_pieces,
    "as GPT-2": lambda path: byte_pairs(path, pattern=None),
    "as Llama 3": lambda path: byte_pairs(path, pattern=LLAMA3),
}


def test_vocabularies_say_what_llama_cpp_has_to_know(tmp_path):
    KINDS["as GPT-2"](tmp_path / "tokenizer.json")
    found = GgufVocabulary.read(tmp_path / "tokenizer.json", size=610)
    assert (found.model, found.split, len(found.tokens)) == ("gpt2", "gpt-2", 610)
    assert found.kinds[0] == CONTROL
    assert found.tokens[605] == "[unused 605]"
    KINDS["as Llama 3"](tmp_path / "tokenizer.json")
    assert GgufVocabulary.read(tmp_path / "tokenizer.json", size=600).split == "llama-bpe"
    KINDS["sentence pieces"](tmp_path / "tokenizer.json")
    found = GgufVocabulary.read(tmp_path / "tokenizer.json", size=859)
    assert found.model == "llama"
    assert found.scores is not None
    assert found.leading_space


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_pairs(path, pattern=r"\w+|\W+")
    with pytest.raises(ExportError, match=r"no name for how .* prepares texts.*try --format hf"):
        GgufVocabulary.read(path, size=600)
    path.write_text("{}")
    with pytest.raises(ExportError, match=r"no tokenizer.json of byte pairs"):
        GgufVocabulary.read(path, size=600)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    with pytest.raises(ExportError, match="byte pairs"):
        GgufVocabulary.read(path, size=600)


@NEEDS_LLAMA
@pytest.mark.parametrize(
    "case", ["Llama 3", "Llama 3.1 (scaled positions)", "Llama, biases", "Llama, linear positions"]
)
def test_llama_cpp_computes_the_same(case, tmp_path):
    nested = nest(case, tmp_path / "in", depth=True)
    small = written(nested, tmp_path / "model.gguf", case=case)
    x = tokens(2, 40)
    with torch.no_grad():
        wanted = small(x).logits_BLV
    found = torch.from_numpy(llama_cpp_process.llama_cpp_logits(tmp_path / "model.gguf", x.numpy(), threads=1))
    assert float((found - wanted).abs().max()) < 1e-3


@NEEDS_LLAMA
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_tokenizes_alike(kind, tmp_path):
    import llama_cpp

    (tmp_path / "in").mkdir()
    tokenizer = KINDS[kind](tmp_path / "in/tokenizer.json")
    nested = nest("Llama 3", tmp_path / "other")
    size = tokenizer.get_vocab_size()
    nested = Nest(replace(nested.family, vocab_size=size), nested.decoder, nested.axes)
    decoder = Decoder(nested.family.decoder_config())
    gguf_file.write_gguf(
        decoder, nested.family, tmp_path / "model.gguf", precision="f32", tokenizer=tmp_path / "in/tokenizer.json",
        texts=TEXTS, name="x",
    )  # fmt: skip
    text = prose()[:6000] + "\n\n  ünïcödé 🙂\t'll 12345 DON'T  x\n\n   "
    model = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert (
        model.tokenize(text.encode(), add_bos=False, special=False)
        == tokenizer.encode(text, add_special_tokens=False).ids
    )
    model.close()


@NEEDS_LLAMA
def test_a_file_that_llama_cpp_cannot_run_is_an_error_of_its_own(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ChildProcessError, match="exit code"):
        llama_cpp_process.llama_cpp_logits(tmp_path / "model.gguf", np.zeros((1, 4), dtype=np.int64), threads=1)
