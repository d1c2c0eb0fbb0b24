"""Finds the plug-ins of a kind: every config file of a group, and every class in the source folder."""

import csv
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any, get_type_hints

from nestlm.config import instantiate
from nestlm.config.compose import compose
from nestlm.config.groups import CONF
from nestlm.pipeline.settings import Settings

# What a test run needs to be small; synthetic text yields a vocabulary of this size.
NANO = [
    "data=synthetic",
    "model.vocab_size=288",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.head_dim=8",
    "model.mlp_width=48",
    "data.sequence_length=32",
    "++ranking.num_sequences=8",  # rankings that read no text have no such field
    "pretrain.steps=6",
    "elastic.steps=4",
    "router.steps=6",
    "joint.steps=3",
]

MIXTURE = ["data=mixture", "data.sources=[{path: a, weight: 3}, {path: b, weight: 1}]"]


def choose(group: str, option: str) -> list[str]:
    """Overrides that choose an option, with what it cannot do without: a folder, or several."""
    if group != "data":
        weights = ["model.weights=."] if option == "pretrained" else []
        return [f"{group}={option}", *weights]
    return ["++data.path=.", *(MIXTURE if option == "mixture" else [f"data={option}"])]


def options(group: str) -> list[str]:
    """Names that `group=NAME` takes."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build(group: str, option: str) -> Any:
    """The object of a group's option, with the settings of a small run around it."""
    around = NANO if group != "data" else []
    node = compose([*around, *choose(group, option)])[group]
    return instantiate.build(node, get_type_hints(Settings, include_extras=True)[group], where=group)


def classes(package: str, base: type | None = None) -> set[str]:
    """Full names of the public classes defined in a package, of one base where given."""
    found = set()
    root = importlib.import_module(package)
    below = [info.name for info in pkgutil.walk_packages(getattr(root, "__path__", []), f"{package}.")]
    for module_name in [package, *below]:
        for name, cls in inspect.getmembers(importlib.import_module(module_name), inspect.isclass):
            own = cls.__module__ == module_name and not inspect.isabstract(cls)
            if own and (base is None or issubclass(cls, base)):
                found.add(f"{module_name}.{name}")
    return found


def targets(node: Any) -> set[str]:
    """Every `_target_` below a config node."""
    if isinstance(node, dict):
        own = {node["_target_"]} if "_target_" in node else set()
        return own.union(*(targets(value) for value in node.values()))
    return set().union(*(targets(item) for item in node)) if isinstance(node, list) else set()


def stages_that_ran(run: Path) -> list[str]:
    """The stages that a run worked on itself, did not find in the cache."""
    with (run / "timings.csv").open() as file:
        ran = [row["what"] for row in csv.DictReader(file) if row["cached"] == "False"]
    return [name for name in ran if " " not in name]  # the others are what evaluation timed
