"""The layout of the source: few loose modules, short files and functions, one name for one thing."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/nestlm"
FILES = sorted(SOURCE.rglob("*.py"))
# A module in one of these folders is one option of a config group, one family, one stage or one verb, and has its name.
PLUGINS = {
    "cli/verbs", "cost", "data/sources", "elastic/axes", "elastic/ranking", "elastic/sampler", "model",
    "pipeline/stages", "router/dynamic", "router/static", "train/callbacks", "train/objective", "train/signal",
}  # fmt: skip
LINES, FUNCTION_LINES, LOOSE = 400, 60, 5


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def repeated(names: list[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def test_few_modules_stand_loose():
    assert len(list(SOURCE.glob("*.py"))) <= LOOSE


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    assert [name for name, length in lengths if length > FUNCTION_LINES] == []


def test_no_two_public_classes_share_a_name():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    classes = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert repeated([name for name in classes if not name.startswith("_")]) == set()


def test_no_two_modules_outside_plug_in_folders_share_a_name():
    modules = [path for path in FILES if name_of(path.parent) not in PLUGINS and path.stem != "__init__"]
    assert repeated([path.stem for path in modules]) == set()


def test_every_folder_of_plug_ins_is_there():
    assert all((SOURCE / folder).is_dir() for folder in PLUGINS)


def test_the_map_of_rooms_names_every_folder_in_the_order_of_imports():
    floors = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    floor_of = {name: number for number, names in enumerate(floors) for name in names.split(" | ")}
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)/` \|", page, flags=re.MULTILINE)
    assert set(rooms) == {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert rooms == sorted(rooms, key=floor_of.__getitem__)


def test_test_files_have_names_of_their_own():
    assert repeated([path.name for path in (ROOT / "tests").rglob("test_*.py")]) == set()
