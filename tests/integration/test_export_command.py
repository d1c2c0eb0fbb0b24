"""`nestlm export`: from a run's folder to models that transformers and llama_cpp.cpp open."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

import nestlm
from nestlm.cli.app import app
from nestlm.errors import ExportError
from nestlm.export import exporter, gguf_file, hub_upload, llama_cpp_process
from nestlm.model.checkpoint import check_sha256sums
from nestlm.nn.policy import fixed

transformers = pytest.importorskip("transformers")


def export(run: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["export", str(run), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def difference(said: str) -> float:
    """Of logits, as a command prints it: 0 on most processors, the last bits of a single row's products on others."""
    (found,) = re.findall(r"largest difference of logits (\S+) in transformers", said)
    return float(found)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_a_folder_opens_with_its_tokenizer_and_tells_what_it_is(static_run, out):
    said = export(static_run, "--budget", "0.8", "--out", str(out))
    assert difference(said) < 1e-5
    assert "the whole model (" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    known = Tokenizer.from_file(str(static_run / "checkpoints/data/tokenizer.json"))
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert ids[0].tolist() == [0, *known.encode("w1 w2 w3").ids], "as documents began in training"
    assert model.generation_config.eos_token_id == 0
    nested = nestlm.load(static_run)
    with torch.no_grad():
        wanted = nested.decoder(ids, nested.at(0.8).policy).logits_BLV
        assert float((model(ids).logits - wanted).abs().max()) < 1e-5
    check_sha256sums(out)
    page, spec = (out / "README.md").read_text(), json.loads((static_run / "specs/0.8.json").read_text())
    provenance = json.loads((static_run / "provenance.json").read_text())
    for fact in ("Asked for: 0.8", f"{spec['achieved']:.2%}", provenance["data_fingerprint"], "trained from scratch"):
        assert fact in page, fact
    for layer, width in enumerate(spec["widths"]["mlp_width"]):
        assert f"| {layer} |" in page
        assert f"| {width} |" in page
    assert "| the whole nested model |" in page
    assert "| memory |" in page


def test_equal_widths_are_the_family_itself(static_run, out):
    export(static_run, "--budget", "0.8", "--uniform", "--dtype", "bf16", "--out", str(out))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    nested = nestlm.load(static_run)
    best, budget = nested.uniform(0.8), nested.at(0.8).budget
    assert nested.prices.fits(best.spec, budget)
    widths = best.spec.widths_by_axis()
    assert all(len(set(each)) == 1 for each in widths.values())
    space = nested.prices.space
    levels = [space.spec(dict.fromkeys(space.sites, level)) for level in range(2)]
    losses = [nested.calibration.loss(fixed(spec)) for spec in levels if nested.prices.fits(spec, budget)]
    assert nested.calibration.loss(best.policy) <= min(losses)


def test_a_dynamic_router_goes_along(dynamic_run, out):
    said = export(dynamic_run, "--budget", "0.8", "--out", str(out))
    assert difference(said) < 1e-5
    assert "for each token how wide" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["router"]["sites"]
    refused = CliRunner().invoke(app, ["export", str(dynamic_run), "--budget=0.8", "--format=gguf", f"--out={out}2"])
    assert "one sub-network for all tokens" in str(refused.exception)
    said = export(dynamic_run, "--budget", "0.8", "--router", "static", "--format", "gguf", "--out", f"{out}3")
    assert "MB on disk" in said


def test_a_gguf_file_is_checked_with_what_is_there(static_run, out, monkeypatch):
    said = export(static_run, "--budget", "0.8", "--format", "gguf", "--out", str(out))
    assert ("llama.cpp did not run it" in said) == (llama_cpp_process.llama_cpp_version() is None)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "SHA256SUMS", "out-f32.gguf"]
    monkeypatch.setattr(llama_cpp_process, "llama_cpp_version", lambda: None)
    said = export(static_run, "--budget", "0.8", "--format", "gguf", "--dtype", "q8_0", "--out", f"{out}2")
    assert "llama.cpp did not run it, since llama-cpp-python is not installed" in said


def test_an_export_that_computes_something_else_leaves_nothing_behind(static_run, tmp_path, monkeypatch):
    model = nestlm.load(static_run)
    written = gguf_file.permute_rotary_rows
    monkeypatch.setattr(
        gguf_file, "permute_rotary_rows", lambda label, value, config, back=False: written(label, value, config)
    )
    with pytest.raises(ExportError, match=r"differ by .*wanted at most 1e-03; nothing is left"):
        model.export(tmp_path / "out", budget=0.8, form="gguf")
    monkeypatch.setattr(exporter, "LIMITS", {"hf": -1.0})
    with pytest.raises(ExportError, match=r"differ by 0\.0e\+00, wanted at most"):
        model.export(tmp_path / "out", budget=0.8)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_said_before_anything_is_computed(static_run, out, monkeypatch):
    model = nestlm.load(static_run)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    out.mkdir()
    (out / "mine").touch()
    for options, said in [
        ({"form": "onnx"}, "--format got 'onnx', wanted one of hf, gguf"),
        ({"precision": "q4"}, "--dtype got 'q4', wanted one of f32"),
        ({"precision": "q8_0"}, "q8_0 is of GGUF"),
        ({"push_to": "name"}, "wanted OWNER/NAME"),
        ({"push_to": "me/name"}, "needs a token"),
        ({"out": out}, "is there already"),
        ({"uniform": True, "router": "dynamic"}, "uniform and router=dynamic"),
        ({"budget": 0.01}, "smallest sub-network costs"),
    ]:
        with pytest.raises(nestlm.errors.NestlmError, match=said):
            model.export(**({"out": f"{out}2", "budget": 0.8} | options))
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_the_hub_gets_the_whole_folder(static_run, out, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append((name, settings))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    nestlm.load(static_run).export(out, budget=0.8, push_to="me/small")
    assert calls[0] == ("me/small", {"private": True, "exist_ok": True})
    assert calls[1][1] == sorted(path.name for path in out.iterdir())

    def refuse(self, **settings):
        raise OSError("no network")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(ExportError, match=r"is complete, but the hub did not take it \(no network\)"):
        hub_upload.upload_model(out, "me/small")
