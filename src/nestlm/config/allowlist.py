"""The classes that `_target_` may name in a config. Any other name is refused before it is imported.

A config is data: one from elsewhere, such as a run's folder, must not be able to run code. A class must suit the
annotation of the field where it stands. These are allowed:

- classes of nestlm, under the name of the module that defines them;
- the classes of other packages that FOREIGN lists;
- classes of packages that the user named: `plugins=[PACKAGE]` on the command line of `nestlm train`, the environment
  variable NESTLM_PLUGINS, or an argument of `nestlm.load`. A run's folder cannot name them by itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nestlm.errors import ConfigError, NotAllowedError
from nestlm.utils.messages import quote_value, suggest_name
from nestlm.utils.quiet import TORCHAO_LOGGERS, quiet_loggers

PLUGINS = "NESTLM_PLUGINS"  # packages, separated by commas
NAME = re.compile(r"[A-Za-z_]\w{0,80}(\.[A-Za-z_]\w{0,80}){0,12}", flags=re.ASCII)
TORCH = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
)  # fmt: skip
TORCHAO = ("Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8")
# The class that a field wants, and the classes of other packages that may stand there.
FOREIGN = {
    "lightning.pytorch.trainer.trainer.Trainer": ("lightning.Trainer", "lightning.pytorch.Trainer"),
    "lightning.pytorch.loggers.logger.Logger": tuple(
        f"lightning.pytorch.loggers.{name}" for name in ("CSVLogger", "TensorBoardLogger", "WandbLogger")
    ),
    "torch.optim.optimizer.Optimizer": (
        *(f"torch.optim.{name}" for name in TORCH),
        *(f"torchao.optim.{name}" for name in TORCHAO),
    ),
}
# Functions that a `_target_` may name, and the class of what they return.
FUNCTIONS = {
    "nestlm.data.sources.auto.source_from_path": "nestlm.data.sources.base.Source",
    "nestlm.router.by_policy.logits_router": "nestlm.router.base.Router",
    "nestlm.router.by_policy.value_router": "nestlm.router.base.Router",
    "nestlm.train.signal.surrogate.surrogate_signal": "nestlm.train.objective.base.Signal",
}


def allowed_plugins(named: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the packages that the user allows: the named ones, and those of NESTLM_PLUGINS.

    Raises:
        NotAllowedError: a name is no dotted name.
    """
    found = [*named, *filter(None, os.environ.get(PLUGINS, "").split(","))]
    return tuple(check_name(name, where="plugins") for name in found)


def plugins_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the packages in the field `plugins` of a config that the user composed on a command line.

    Raises:
        NotAllowedError: a name is no dotted name.
    """
    named = config.get("plugins")
    return tuple(check_name(name, where="plugins") for name in named) if isinstance(named, list) else ()


def check_plugins(named: Any, *, allowed: Sequence[str]) -> None:
    """Raise NotAllowedError if a config names a package of plug-ins that the user does not allow.

    Args:
        named: the config's field `plugins`.
        allowed: packages that the user allows.
    """
    for name in named if isinstance(named, list) else ():
        if check_name(name, where="plugins") not in allowed:
            raise NotAllowedError(
                f"plugins: the run uses classes of the package {name}, which its config cannot allow by itself; if you "
                f'trust that package, set {PLUGINS}={name}, or nestlm.load(..., plugins=["{name}"])'
            )


def check_name(name: Any, *, where: str) -> str:
    """Return a name if it is a dotted name, such as package.module.Class; raise NotAllowedError otherwise."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise NotAllowedError(f"{where}: got {quote_value(name)}, wanted a dotted name, such as package.module.Class")
    return name


def locate(path: Any, kinds: Sequence[type], *, where: str, plugins: Sequence[str]) -> Callable[..., Any]:
    """Import the class that a `_target_` names, if a config may name it.

    Args:
        path: the value of `_target_`.
        kinds: base classes or protocols that the field wants.
        where: dotted name of the field, for messages.
        plugins: packages that the user allows.

    Raises:
        NotAllowedError: the value is no dotted name, is not allowed, or names an object of another type.
        ConfigError: the name does not exist, or its package is not installed.
    """
    key = f"{where}._target_".lstrip(".")
    name = check_name(path, where=key)
    foreign = [each for kind in kinds for each in FOREIGN.get(full_name(kind), ())]
    package = name.partition(".")[0]
    plugin = next((each for each in plugins if name.startswith(f"{each}.")), None)
    wanted = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
    if name not in foreign and package != "nestlm" and plugin is None:
        few = sorted(foreign, key=lambda each: not each.endswith(("AdamW", "CSVLogger")))[:3]
        raise NotAllowedError(
            f"{key}: {quote_value(name)} is not allowed; wanted {', or '.join([f'a {wanted} of nestlm', *few])}; "
            f"classes of your own package need plugins=[{package}] on the command line of train.py; a run of them "
            f"{PLUGINS}={package}"
        )
    found = import_object(name, where=where)
    if name in FUNCTIONS and FUNCTIONS[name] in map(full_name, kinds):
        return found
    own = name in foreign or (
        full_name(found) == name if plugin is None else f"{getattr(found, '__module__', '')}.".startswith(f"{plugin}.")
    )
    if not inspect.isclass(found) or not own or not any(suits(found, kind) for kind in kinds):
        raise NotAllowedError(
            f"{key}: {quote_value(name)} is no {wanted} that its module defines; wanted the name of such a class"
        )
    return found


def full_name(kind: Any) -> str:
    """Return the module and the name of a class, joined by a dot."""
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def suits(found: type, kind: type) -> bool:
    """Tell whether a class can be built and is a subclass of a kind, or has every member of a protocol."""
    if inspect.isabstract(found) or getattr(found, "_is_protocol", False):
        return False
    if not getattr(kind, "_is_protocol", False):
        return issubclass(found, kind)
    has = {*dir(found), *(name for base in found.__mro__ for name in vars(base).get("__annotations__", ()))}
    protocols = [base for base in kind.__mro__ if vars(base).get("_is_protocol")]
    wanted = {name for base in protocols for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return {name for name in wanted if not name.startswith("_")} <= has


def import_object(path: str, *, where: str) -> Any:
    """Import the object at a dotted path, without asking whether a config may name it.

    Raises:
        ConfigError: it does not exist; the message suggests the most similar name.
    """
    module_path, _, name = path.rpartition(".")
    if not module_path:
        raise ConfigError(f"{where}._target_: got {path!r}, wanted a dotted name, such as package.module.Class")
    try:
        with quiet_loggers(*TORCHAO_LOGGERS):  # of `optim=adamw_8bit`
            module = importlib.import_module(module_path)
    except ImportError as error:
        package_path, _, missing = module_path.rpartition(".")
        folders = getattr(sys.modules.get(package_path), "__path__", None)
        if error.name != module_path or folders is None:
            extras = importlib.metadata.metadata("nestlm").get_all("Provides-Extra") or []
            cure = f"pip install 'nestlm[{error.name}]'" if error.name in extras else "is its package installed?"
            raise ConfigError(f"{where}._target_: cannot import {module_path!r} ({error}); {cure}") from None
        siblings = [info.name for info in pkgutil.iter_modules(folders)]
        raise ConfigError(f"{where}: {package_path} has no {missing!r}{suggest_name(missing, siblings)}") from None
    if not hasattr(module, name):
        classes = [each for each, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"{where}._target_: {module_path} has no {name!r}{suggest_name(name, classes)}")
    return getattr(module, name)
