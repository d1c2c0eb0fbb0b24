"""`nestlm evaluate`: the run's own numbers again, other texts, and tasks through the real harness, offline."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import nestlm
from nestlm.api.nested_model import NestedModel
from nestlm.cli.app import app
from nestlm.data.preparation import prepare_source
from nestlm.data.sources.text import TextFolder
from nestlm.errors import ConfigError, DataError, NestlmError
from nestlm.report.tables import read_csv

COLUMNS = ("achieved", "val_loss", "perplexity", "bits_per_byte", "accuracy")
QUESTIONS = [
    {"question": "the old cat sees the", "choices": ["dog and", "tree", "house then"], "answer": 1},
    {"question": "a river", "choices": ["sees the", "over", "and then"], "answer": 0},
    {"question": "the red dog finds the house under the old tree", "choices": ["and", "over", "then a"], "answer": 2},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}, train: {data}}}
  cache_dir: {cache}
test_split: test
training_split: train
doc_to_text: "{{{{question}}}}"
"""
CHOICES = (
    TASK
    + """
output_type: multiple_choice
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
)
TEXTS = (
    TASK
    + """
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}} {{{{question}}}} {{{{question}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
)
WRITES = (
    TASK
    + """
output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 5}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_scores_of_a_runs_budgets_are_those_of_its_results(static_run, dynamic_run):
    for folder in (static_run, dynamic_run):
        model = nestlm.load(folder)
        known = {(row["router"], str(row["budget"])): row for row in read_csv(folder / "results.csv")}
        rows = model.evaluate()
        assert [row["budget"] for row in rows] == [str(budget) for budget in model.budgets]
        for row in rows:
            recorded = known[row["router"], row["budget"]]
            assert {name: row[name] for name in COLUMNS} == {name: recorded[name] for name in COLUMNS}


def test_other_texts_are_scored_in_the_runs_tokens(static_run, tmp_path):
    text, shards = tmp_path / "text", tmp_path / "shards"
    for folder in (text, shards):
        folder.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(f"the old house number {number} sees the river. " * 12)
    model = nestlm.load(static_run)
    tokenizer = static_run / "checkpoints/data/tokenizer.json"
    prepare_source(TextFolder(str(text)), shards, vocab_size=288, tokenizer_file=tokenizer, heldout_share=0.1)
    (row,) = model.evaluate([0.8], data=str(text))
    (part,) = model.evaluate([0.8], data=str(shards))
    split = replace(model.settings.data, source=TextFolder(str(text)), heldout_share=0.1)
    assert model.evaluate([0.8], data=split) == [part], "the validation split"
    assert row["val_loss"] != part["val_loss"], "all of a text that is not split"
    assert row["val_loss"] != model.evaluate([0.8])[0]["val_loss"]
    out = tmp_path / "scores"
    done = command(static_run, "data=text", f"data.path={text}", "--budgets", "0.8,0.7+0.9params", "--out", out)
    assert done.exit_code == 0, done.output
    written = read_csv(tmp_path / "scores.csv")
    assert written[0]["val_loss"] == row["val_loss"]
    assert written[1]["budget"] == "0.7+0.9params"
    assert "| surrogate-static | 0.8 |" in " ".join((tmp_path / "scores.md").read_text().split())
    assert f"data.path={text}" in done.stdout
    longer = command(static_run, f"data.path={text}", "data.sequence_length=512", "--out", out)
    assert isinstance(longer.exception, SystemExit)
    assert longer.exit_code == 2
    assert "data.sequence_length: got 512, wanted at most model.context_length=" in longer.stderr


def test_one_file_is_scored_whole(static_run, tmp_path):
    """Its tokens in rows of the run's length, the first of which begins with the begin token."""
    model, file = nestlm.load(static_run), tmp_path / "test.txt"
    file.write_text("the old house sees the river. " * 100)
    length = model.settings.data.sequence_length
    ids = model.encode(file.read_text())
    rows = torch.tensor([ids[start : start + length + 1] for start in range(0, len(ids) - length, length)])
    with torch.no_grad():
        logits_BLV = model.decoder(rows[:, :-1], model.at(0.8).policy).logits_BLV
    wanted = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), rows[:, 1:].flatten())
    out = tmp_path / "scores"
    done = command(static_run, "data=text", f"data.path={file}", "--budgets", "0.8", "--out", out)
    assert done.exit_code == 0, done.output
    assert read_csv(tmp_path / "scores.csv")[0]["val_loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_the_runs_own_text_is_scored_on_what_was_held_out(static_run):
    model = nestlm.load(static_run)
    own = replace(model.settings.data, heldout_share=None)
    assert model.evaluate([0.8], data=own) == model.evaluate([0.8])


def test_what_cannot_be_evaluated_is_said(static_run, tmp_path):
    for arguments, said in {
        ("model=small",): "model=small: only the data group",
        ("data.path=nowhere",): "data.path: nowhere is no folder",
        ("data.pth=a",): "data.pth",
        ("--shots", "piqa=many"): "--shots: got 'piqa=many', wanted TASK=NUMBER",
        ("--budgets", "0.8,tiny"): "budget: got 'tiny'",
        ("--budgets", "0.1"): "ask for at least that",
    }.items():
        done = command(static_run, *arguments)
        assert done.exit_code in (1, 2)
        assert said in done.output + str(done.exception)
    assert not (static_run / "evaluation.csv").exists()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    pytest.importorskip("lm_eval", reason="the harness is not installed; pip install 'nestlm[eval]'")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, content in {"choices": CHOICES, "texts": TEXTS, "writes": WRITES}.items():
        (folder / f"{name}.yaml").write_text(content.format(name=name, data=data, cache=folder / "cache"))
    return folder


def log_probability(model: NestedModel, budget: float, text: str, *, start: int = 0) -> float:
    """Of a text from its token `start` on, by one forward pass over all of it."""
    separator, ids = 0, model.tokenizer.encode(text).ids
    output = model.decoder(torch.tensor([[separator, *ids[:-1]]]), model.at(budget).policy)
    said = output.logits_BLV[0].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
    return float(said[start:].sum())


@torch.no_grad()
def test_tasks_are_scored_as_by_hand(dynamic_run, tasks):
    model = nestlm.load(dynamic_run)
    budgets = [1.0, 0.8]
    rows = model.evaluate(budgets, tasks=["choices", "texts", "writes"], task_files=tasks)
    for row, budget in zip(rows, budgets, strict=True):
        right, bits, size = 0, 0.0, 0
        for question in QUESTIONS:
            start = len(model.tokenizer.encode(question["question"]).ids)
            said = [
                log_probability(model, budget, f"{question['question']} {choice}", start=start)
                for choice in question["choices"]
            ]
            right += said.index(max(said)) == question["answer"]
            text = " ".join([question["question"]] * 3)
            bits -= log_probability(model, budget, text) / torch.log(torch.tensor(2.0)).item()
            size += len(text.encode())
        assert row["choices acc"] == pytest.approx(right / len(QUESTIONS))
        assert row["choices acc stderr"] >= 0
        assert row["texts bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
        assert row["writes exact_match"] == 0.0


@torch.no_grad()
def test_one_request_at_a_time_and_many_agree(dynamic_run, tasks):
    """Of a policy under which tokens differ, with requests of different lengths, some beyond the context."""
    from lm_eval.api.instance import Instance

    from nestlm.eval.lm_harness import HarnessModel

    model = nestlm.load(dynamic_run)
    policy = model.at(0.8).policy
    texts = [
        (question["question"] * repeat, " sees the cat"[: 4 * repeat])
        for question in QUESTIONS
        for repeat in (1, 3, 40)
    ]
    assert len(model.tokenizer.encode(texts[-1][0]).ids) > model.decoder.config.context_length

    def ask(size: int) -> tuple[list, list, list]:
        asked = HarnessModel(
            model.decoder,
            policy,
            tokenizer=model.tokenizer,
            special_tokens=model.special_tokens,
            batch_size=size,
            precision=torch.no_grad,
        )
        pairs = [Instance("loglikelihood", {}, text, 0) for text in [*texts, ("", "the cat")]]
        whole = [Instance("loglikelihood_rolling", {}, (text,), 0) for text, _ in texts]
        options = {"until": ["e"], "max_gen_toks": 6}
        written = [Instance("generate_until", {}, (text, options), 0) for text, _ in texts]
        found = asked.loglikelihood(pairs, disable_tqdm=True)
        return found, asked.loglikelihood_rolling(whole), asked.generate_until(written)

    (single, single_whole, single_text), (batch, batch_whole, batch_text) = ask(1), ask(5)
    torch.testing.assert_close(torch.tensor(batch), torch.tensor(single), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(batch_whole), torch.tensor(single_whole), rtol=1e-4, atol=1e-4)
    assert batch_text == single_text
    for (context, text), (said, _) in zip(texts, batch, strict=False):
        start, end = (len(model.tokenizer.encode(part).ids) for part in (context, context + text))
        if end < model.decoder.config.context_length:
            assert said == pytest.approx(log_probability(model, 0.8, context + text, start=start), rel=1e-4)
    assert not any("e" in text for text in single_text)


def test_tasks_that_are_not_there(static_run, tasks, monkeypatch):
    model = nestlm.load(static_run)
    with pytest.raises(ConfigError, match="tasks: got 'chioces', wanted one of choices, texts, writes"):
        model.evaluate([0.8], tasks=["chioces"], task_files=tasks)
    with pytest.raises(ConfigError, match="task_files: nowhere is no folder"):
        model.evaluate([0.8], tasks=["choices"], task_files="nowhere")
    with pytest.raises(ConfigError, match="limit: got 0, wanted 1 or more"):
        model.evaluate([0.8], tasks=["choices"], task_files=tasks, limit=0)
    (tasks / "gone.yaml").write_text(CHOICES.format(name="gone", data=tasks / "gone.jsonl", cache=tasks / "cache"))
    with pytest.raises(DataError, match=r"tasks: cannot read the data of gone .*take task files"):
        model.evaluate([0.8], tasks=["gone"], task_files=tasks)
    monkeypatch.delitem(sys.modules, "nestlm.eval.lm_harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match=r"tasks: .*lm_eval.*pip install 'nestlm\[eval\]'"):
        model.evaluate([0.8], tasks=["choices"], task_files=tasks)


CODE_IN_TASKS = {  # a line of a task file, and what is said of it
    "process_docs: !function helpers.write": "plain values",
    "process_docs: !!python/name:os.system": "plain values",
    "metric_list: [{metric: helpers.py, hf_evaluate: true}]": "hf_evaluate",
    "include: ../elsewhere.yaml": "includes",
    "include: /elsewhere.yaml": "includes",
    "include: hidden.yml": "includes",
    "doc_to_text: \"{{ cycler.__init__.__globals__.os.mkdir('ran') }}\"": "template",
    "unsafe_code: true": "programs that the model writes",
}


@pytest.mark.parametrize("line", CODE_IN_TASKS)
def test_task_files_run_no_code(line, static_run, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    content = CHOICES.format(name="choices", data=folder / "questions.jsonl", cache=folder / "cache")
    others = re.sub(rf"(?m)^{line.partition(':')[0]}:.*\n( .*\n)*", "", content)
    (folder / "choices.yaml").write_text(f"{others}{line}\n")
    runs = "import pathlib\npathlib.Path('ran').mkdir()\ndef write(docs): return docs\n"
    (folder / "helpers.py").write_text(runs)
    for name in ("elsewhere.yaml", "tasks/hidden.yml"):
        (tmp_path / name).write_text("process_docs: !function helpers.write\n")
    with pytest.raises(NestlmError, match=CODE_IN_TASKS[line]):
        nestlm.load(static_run).evaluate([0.8], tasks=["choices"], task_files=folder)
    assert not (tmp_path / "ran").exists()


def test_shots_are_the_papers_the_tasks_or_those_that_are_asked_for(tasks):
    from nestlm.eval.lm_harness import SHOTS, load_tasks

    (asked,) = load_tasks(["choices"], files=tasks, shots=SHOTS)
    assert asked.shots is None, "what the task says"
    (asked,) = load_tasks(["choices"], files=tasks, shots={**SHOTS, "choices": 2})
    assert asked.shots == 2
    assert SHOTS == {"hellaswag": 10, "mmlu": 5}
