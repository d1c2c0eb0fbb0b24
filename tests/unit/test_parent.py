"""What exports take from a parent's folder, what stays behind, and that nothing in it runs."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import parity
from exports import tokens
from models import AXES
from nestlm.data.special_tokens import SpecialTokens
from nestlm.elastic.axes.base import search_space
from nestlm.errors import CheckpointError, ExportError
from nestlm.export import exporter, gguf_file, hf_folder, new_folder
from nestlm.export.model_card import CardFacts
from nestlm.model.checkpoint import CHECKSUMS, check_sha256sums, read_hf_config
from nestlm.model.parent_files import ParentFiles
from nestlm.pipeline.cache import contents_identity

transformers = pytest.importorskip("transformers")
FACTS = CardFacts("0.6", {"flops": ("6 FLOPs", 0.6)}, "knapsack", "owner/parent", "f" * 8, None, {"the parent": 3.0})
CHAT, TOOLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "{{ tools }} {{ messages }}"
CODE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama checkpoint in shards."""
    parity.checkpoint("Llama 3", tmp_path / "in")
    return tmp_path / "in"


def edit(path: Path, **changes) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | changes))


def export(folder: Path, out: Path, *, uneven: bool = True, **options) -> exporter.ExportSource:
    """Export a sub-network of a checkpoint, by way of what a run keeps of it."""
    family, decoder = parity.imported(folder)
    kept = folder.with_name("kept")
    family.read_parent_files().write(kept)
    tokenizer, special = kept / "tokenizer.json", SpecialTokens(0, (0,))
    nested = exporter.ExportSource(
        decoder.eval(), family, ParentFiles.read(kept), AXES, tokenizer, special, tokens(2, 40)
    )
    space = search_space(AXES, decoder.config)
    level = {site: (site.layer + 1) % len(row) for site, row in space.choices.items()}
    chosen = exporter.ExportChoice(space.spec(level) if uneven else space.full())
    exporter.export_model(nested, chosen, out, facts=FACTS, **({"form": "hf", "precision": None} | options))
    return nested


@pytest.mark.parametrize("uneven", [True, False])
def test_code_of_a_parent_neither_runs_nor_travels(folder, tmp_path, uneven):
    marker, home = tmp_path / "marker", tmp_path / "elsewhere"
    home.mkdir()
    for path in (home / "own.py", folder / "own.py", folder / "custom_generate/generate.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(marker=str(marker)))
    leads = {"AutoConfig": f"{home}--own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": [None, "own.Own"]}
    keys = {"auto_map": leads, "trust_remote_code": True, "deeper": [{"auto_map": leads}], "custom_pipelines": {"a": 1}}
    edit(folder / "config.json", **keys, tokenizer_class="OwnTokenizer", attn_implementation="someone/kernel")
    edit(folder / "tokenizer_config.json", **keys, tokenizer_class="OwnTokenizer")
    edit(folder / "generation_config.json", auto_map=leads, custom_generate="someone/decoding")
    edit(folder / "processor_config.json", auto_map={"AutoProcessor": "own.Own"})
    nested = export(folder, tmp_path / "out", uneven=uneven)
    said = "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert not any(word in said for word in ("own.Own", "someone/", "OwnTokenizer", "trust_remote_code"))
    code = sorted(path.name for path in (tmp_path / "out").rglob("*.py"))
    assert code == (["modeling_nested.py"] if uneven else [])
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert opened("w1 w2").input_ids[-2:] == Tokenizer.from_file(str(nested.tokenizer)).encode("w1 w2").ids[-2:]
    assert not marker.exists()


def test_an_export_with_other_code_than_ours_is_not_opened(folder, tmp_path):
    nested, out = export(folder, tmp_path / "out"), tmp_path / "out"
    hf_folder.check_code(out, nested.family, hf_folder.NESTED)
    config = (out / "config.json").read_text()
    for path, content in {
        "other.py": "pass",
        "modeling_nested.py": (out / "modeling_nested.py").read_text() + "\npass",
        "sub/pytorch_model.bin": "pickle",
        "config.json": config.replace("modeling_nested.Nested", "someone/repo--modeling_nested.Nested"),
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["modeling_nested.Other", null]}}',
    }.items():
        shutil.copytree(out, tmp_path / "bad")
        (tmp_path / "bad/sub").mkdir()
        (tmp_path / "bad" / path).write_text(content)
        with pytest.raises(ExportError, match=path):
            hf_folder.check_code(tmp_path / "bad", nested.family, hf_folder.NESTED)
        shutil.rmtree(tmp_path / "bad")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to(nested.tokenizer)
    with pytest.raises(ExportError, match=r"tokenizer\.json is not a file of nestlm"):
        hf_folder.check_code(out, nested.family, hf_folder.NESTED)


def test_what_belongs_to_a_parent_travels_and_nothing_else(folder, tmp_path):
    plain = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(plain), indent=4))
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)
    edit(folder / "special_tokens_map.json", eos_token="w1")
    edit(folder / "generation_config.json", eos_token_id=[0, 5], top_p=0.5)
    for name in (
        "adapter_config.json",
        "pytorch_model.bin.index.json",
        "notes.txt",
        "tree.png",
        "preprocessor_config.json",
    ):
        (folder / name).write_text("{}")
    run = tmp_path / "run"
    run.mkdir()
    nested = export(folder, tmp_path / "out")
    Tokenizer.from_str(plain).save(str(run / "tokenizer.json"), pretty=False)
    assert exporter.brings_tokenizer(replace(nested, tokenizer=run / "tokenizer.json")), (
        "laid out otherwise, and the same"
    )
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    ours = {
        "config.json",
        "model.safetensors",
        "README.md",
        "SHA256SUMS",
        "modeling_nested.py",
        "additional_chat_templates",
    }
    theirs = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == ours | theirs | {"chat_template.jinja"}
    check_sha256sums(tmp_path / "out")
    assert "tool_use.jinja" in (tmp_path / "out" / CHECKSUMS).read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == {"default": CHAT, "tool_use": TOOLS}
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.top_p) == ([0, 5], 0.5)


def test_a_gguf_file_has_the_parents_templates_and_ends(folder, tmp_path):
    listed = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": TOOLS}]
    edit(folder / "tokenizer_config.json", chat_template=listed, pad_token="w1")
    nested = export(folder, tmp_path / "out", form="gguf", precision="f32")
    assert nested.parent is not None
    nested = replace(nested, special_tokens=SpecialTokens(0, (5, 7)))
    tokenizer = Tokenizer.from_file(str(nested.tokenizer))
    texts = exporter.text_format(nested)
    assert (texts.begin, texts.end, texts.turn_end, texts.pad) == (0, 5, 7, tokenizer.token_to_id("w1"))
    assert not texts.adds_begin, "the tokenizer puts nothing before a text"
    path = tmp_path / "model.gguf"
    told = {"precision": "f32", "tokenizer": nested.tokenizer, "texts": texts, "name": "x"}
    gguf_file.write_gguf(nested.decoder, nested.family, path, **told)
    reader = gguf_file.import_gguf().GGUFReader(path)
    said = {name: reader.get_field(f"tokenizer.{name}").contents() for name in (
        "chat_template", "chat_template.tool_use", "ggml.bos_token_id", "ggml.eos_token_id", "ggml.eot_token_id",
    )}  # fmt: skip
    assert list(said.values()) == [CHAT, TOOLS, 0, 5, 7]
    (folder / "chat_template.jinja").write_text("of the file")
    parent = ParentFiles.from_checkpoint(folder)
    assert parent.chat_templates() == {"default": "of the file"}, "as transformers chooses"


def test_links_lead_out_of_no_folder_but_a_hubs_snapshot(folder, tmp_path):
    secret = tmp_path / "secret.jinja"
    secret.write_text("a secret")
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a link out of its folder; put a copy"):
        ParentFiles.from_checkpoint(folder)
    (folder / "chat_template.jinja").unlink()
    snapshot, blobs = tmp_path / "cached/snapshots/abc", tmp_path / "cached/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "README.md").symlink_to("../../blobs/absent")
    (snapshot / "merges.txt").symlink_to("../../blobs/absent")
    family, _ = parity.imported(snapshot)
    assert "merges.txt" not in family.read_parent_files().files
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="link out of"):
        read_hf_config(snapshot)


@pytest.mark.parametrize(
    "name", ["../in/model.safetensors", "/tmp/model.safetensors", "sub/model.safetensors", "..", ""]
)
def test_an_index_names_files_beside_it(folder, name):
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=names | {next(iter(names)): name})
    with pytest.raises(CheckpointError, match=r"index\.json names .*wanted the plain name of a file beside it"):
        parity.imported(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret"])
def test_checksums_name_files_of_the_same_folder(folder, name):
    (folder / CHECKSUMS).write_text("".join(f"{'0' * 64}  {each}\n" for each in ("model.safetensors", name)))
    with pytest.raises(CheckpointError, match=r"names .*wanted a file of the same folder"):
        check_sha256sums(folder)


def test_one_file_comes_before_the_index_of_older_shards(folder):
    """As in transformers."""
    newer = {name: value + 0.25 for name, value in parity.weights_of(folder).items()}
    save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})
    _, decoder = parity.imported(folder)
    assert parity.largest_difference(decoder, parity.opened(folder))[0] < 1e-5
    for shard in folder.glob("model-*"):
        shard.unlink()
    assert torch.equal(parity.imported(folder)[1].embed.weight, newer["model.embed_tokens.weight"])


def test_weights_are_checked_by_their_headers(folder):
    family, _ = parity.imported(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    whole = shard.read_bytes()

    def refused(match):
        with pytest.raises(CheckpointError, match=match):
            family.check_weights(dry_run=True)

    shard.write_bytes(whole[:-4])
    refused("is absent or damaged")
    shard.write_bytes(whole)
    state = load_file(shard)
    name = next(iter(state))
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, shard)
    refused(f"{name} holds F8_E4M3, wanted F32, F16, BF16, F64: quantized weights are not read")
    shard.unlink()
    refused(f"index.json names {shard.name}, which is not in")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(
        r"no model\.safetensors and no index of several \(pytorch_model\.bin is not read: such a file can run code\)"
    )


def test_a_tied_head_of_its_own_is_refused(tmp_path):
    parity.checkpoint("Llama 3.2 (tied)", tmp_path / "in", shard_size="1GB")
    file = tmp_path / "in/model.safetensors"
    state = load_file(file)
    embedding = state["model.embed_tokens.weight"]
    family, plain = parity.imported(tmp_path / "in")
    save_file(state | {"lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    family.check_weights(dry_run=True)
    save_file(state | {"lm_head.weight": embedding + 0.25}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .*set tie_word_embeddings to false"):
        family.check_weights(dry_run=True)
    edit(tmp_path / "in/config.json", tie_word_embeddings=False)
    assert parity.largest_difference(parity.imported(tmp_path / "in")[1], parity.opened(tmp_path / "in"))[0] < 1e-5
    edit(tmp_path / "in/config.json", tie_word_embeddings=True)
    save_file({**{k: v for k, v in state.items() if v is not embedding}, "lm_head.weight": embedding}, file)
    assert torch.equal(parity.imported(tmp_path / "in")[1].embed.weight, plain.embed.weight), "either is enough"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "no JSON.*nested too deeply"),
        ('{"a": NaN}', "holds NaN, which is no number of JSON"),
        ('\ufeff{"a": 1}', "no JSON.*BOM"),
        ("[1]", "holds a list, wanted an object"),
    ],
)
def test_json_that_is_none_is_named_in_a_short_line(folder, content, said):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_hf_config(folder)
    assert len(str(caught.value)) < 400
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        ParentFiles.from_checkpoint(folder)


def test_weights_are_the_same_by_their_content(tmp_path):
    known = tmp_path / "cache/weights.json"
    one, copy = tmp_path / "one.bin", tmp_path / "copy.bin"
    one.write_bytes(b"weights")
    shutil.copy(one, copy)
    found = contents_identity([one], known=known)
    remembered = known.read_bytes()
    assert contents_identity([one], known=known) == found == contents_identity([copy], known=tmp_path / "other.json")
    assert known.read_bytes() == remembered, "what did not change is not hashed again"
    os.utime(one, ns=(1, 1))
    assert contents_identity([one], known=known) == found
    stat = one.stat()
    one.write_bytes(b"WEIGHTS")
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents_identity([one], known=known) != found, "as large, and as old"
    for damage in (b"{", b"[]", json.dumps({str(one): {"state": 1}, str(copy): 3}).encode()):
        known.write_bytes(damage)
        assert contents_identity([copy], known=known) == found


def test_numbers_beyond_a_dtype_are_refused_by_name(folder, tmp_path):
    family, decoder = parity.imported(folder)
    weight, texts = decoder.blocks[1].mlp.up.weight, gguf_file.TextFormat(0, 0)
    told = {"tokenizer": folder / "tokenizer.json", "texts": texts, "name": "x"}
    name, cure = r"model\.layers\.1\.mlp\.up_proj\.weight", "wanted a dtype of larger range: --dtype bf16 or f32"

    def refused(said, *, value, precision):
        with torch.no_grad():
            weight[0, 0] = value
        for act in (
            lambda: gguf_file.write_gguf(decoder, family, tmp_path / "x.gguf", precision=precision, **told),
            lambda: hf_folder.hf_state_dict(decoder, family, dtype=exporter.DTYPES.get(precision, torch.float16)),
        ):
            with pytest.raises(ExportError, match=said):
                act()

    refused(f"{name} holds a weight of size 100000, and float16 ends at 65504; {cure}", value=-1e5, precision="f16")
    refused(f"{name} .*ends at .*; {cure}", value=1e8, precision="q8_0")
    refused(f"{name} .*bfloat16 ends at", value=3.4e38, precision="bf16")
    for value in (torch.nan, torch.inf):
        refused(f"{name} holds numbers that are not finite", value=value, precision="f32")
    assert not (tmp_path / "x.gguf").exists()


def test_logits_that_overflow_say_which_dtype_will_do(folder, tmp_path):
    """The nested model computes in float32; its export in half precision leaves the range."""
    state = parity.weights_of(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    for name in state:
        if "mlp" in name:
            state[name] = state[name] * 3e3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"logits in transformers .* are not finite: .*--dtype bf16 or f32") as caught:
        export(folder, tmp_path / "out", precision="f16")
    assert "report" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_leftovers_of_killed_exports_are_removed(tmp_path):
    for name in (".out-killed", ".out-running", ".out-theirs", ".other-killed"):
        (tmp_path / name / "model").mkdir(parents=True)
    for name in (".out-killed", ".out-running", ".other-killed"):
        (tmp_path / name / new_folder.LOCK).touch()
    with FileLock(tmp_path / ".out-running" / new_folder.LOCK), new_folder.new_folder(tmp_path / "out") as filled:
        (filled / "file").write_text("")
        (running,) = [path for path in tmp_path.glob(".out-*/*") if path == filled]
        assert running.with_name(new_folder.LOCK).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-killed", ".out-running", ".out-theirs", "out"]


def test_places_are_checked_before_anything_is_computed(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "file").write_text("")
    new_folder.check_can_be_made(tmp_path / "new/out", run=run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    for out, said in {
        run / "export": "lies in the run's folder",
        tmp_path / "file": "is there already",
        tmp_path / "file/out": "Not a directory",
        tmp_path / ("x" * 250): "File name too long",
        Path("/proc/out"): "cannot write /proc/out",
    }.items():
        with pytest.raises(ExportError, match=said):
            new_folder.check_can_be_made(out, run=run)
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(ExportError, match="is a mount point"):
        new_folder.check_can_be_made(tmp_path / "mounted", run=run)


def test_a_record_of_the_parent_is_read_as_it_was_written(folder, tmp_path):
    parent = ParentFiles.from_checkpoint(folder, repository="owner/name")
    parent.write(tmp_path / "kept")
    assert ParentFiles.read(tmp_path / "kept") == parent
    assert hf_folder.parent_dtypes(parent)["lm_head.weight"] == torch.float32
    edit(tmp_path / "kept/parent.json", dtypes={"lm_head.weight": "I8"})
    with pytest.raises(ExportError, match="'I8'; copy the run again"):
        hf_folder.parent_dtypes(ParentFiles.read(tmp_path / "kept"))
    for damage in ({"dtypes": []}, {"repository": "a](http://b)"}):
        edit(tmp_path / "kept/parent.json", **damage)
        with pytest.raises(CheckpointError, match=r"parent\.json is damaged"):
            ParentFiles.read(tmp_path / "kept")
