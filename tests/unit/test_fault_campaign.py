"""The campaign of kills, damages and bad overrides sees what is wrong, and leaves no file out."""

import random
from pathlib import Path

import pytest

import bad_overrides
from fault_damages import DAMAGES, TARGETS, Victim, draws
from fault_place import Ended, Place, call


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damage_changes_a_file(kind, tmp_path):
    for name in ("here", "there", "elsewhere"):
        (tmp_path / name / "part").mkdir(parents=True)
    path, other = tmp_path / "here/part/file.json", tmp_path / "there/part/file.json"
    path.write_text('{"seed": 10}' * 500)
    other.write_text('{"seed": 20}' * 500)
    before = path.read_bytes()
    DAMAGES[kind](Victim(path, tmp_path / "here", other, tmp_path / "elsewhere", random.Random(0)))
    if kind == "a link elsewhere":
        assert path.is_symlink()
        assert path.read_bytes() == before
    else:
        assert not path.is_file() or path.read_bytes() != before


def test_every_file_is_damaged_once_before_any_is_twice(tmp_path, monkeypatch):
    names = [f"file {number}" for number in range(7)]
    monkeypatch.setattr(type(TARGETS["run, static"]), "files", lambda self, place: names)
    order = draws(Place(tmp_path), "run, static", 0)
    assert sorted(file for file, _ in order[:7]) == names
    assert len(set(order)) == len(order) == 7 * len(DAMAGES)


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(0, "text", ""), None),
        (Ended(2, "", "progress\nerror: a.json: got 1, wanted 2\n"), None),
        (Ended(2, "", "error: one\ntwo\n"), "2 lines"),
        (Ended(2, "", "usage"), "exit code 2"),
        (Ended(1, "", "error: one"), "exit code 1"),
        (Ended(2, "", f"error: {'x' * 600}"), "600 characters"),
        (Ended(2, "", "error: loss is nan"), "nan or inf"),
        (Ended(None, "", "", "KeyError at a.py:3: 'x'"), "KeyError"),
    ],
)
def test_what_is_wrong_about_an_end_is_named(ended, wrong):
    found = ended.fault()
    assert found is None if wrong is None else wrong in (found or "")


def test_a_refusal_may_quote_what_was_asked():
    refused = Ended(2, "", "error: seed: got nan\nwanted a whole number")
    assert refused.fault(lines=2, asked="seed=nan") is None
    assert refused.fault(lines=2, asked="seed=0.5") is not None


def test_commands_are_called_within_the_process():
    def fail():
        raise KeyError("lost")

    assert (call(lambda: print("said"), ["x"]).output, call(lambda: None, ["x"]).code) == ("said\n", 0)
    assert call(lambda: (_ for _ in ()).throw(SystemExit(2)), ["x"]).refused
    assert f"KeyError at {Path(__file__).name}" in call(fail, ["x"]).failure
    assert "hangs" in call(lambda: [Path() for _ in iter(int, 1)], ["x"], seconds=1).failure


def test_overrides_of_a_seed_are_the_same_again():
    first, again = ([bad_overrides.bad_override(seed, number) for number in range(44)] for seed in (3, 3))
    assert first == again
    assert {kind for kind, _ in first} == set(bad_overrides.KINDS)
    assert bad_overrides.command("data=hub") == ["dry_run=true", "data=hub"]
    assert bad_overrides.command("~seed") == ["dry_run=true", "data=synthetic", "~seed"]
