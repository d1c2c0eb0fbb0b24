"""From plain values of a config to objects: everything is checked first, then everything is made.

`_target_` names a class, `_partial_: true` one that is called later. A node stands only where the annotation of a
parameter wants such a class: `Sampler`, or `Callable[..., Router]` for one that is called later. Nothing but the
classes that were checked is called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nestlm.config.allowlist import FOREIGN, full_name, locate
from nestlm.errors import ConfigError, NestlmError, NotAllowedError
from nestlm.utils.deferred import Deferred
from nestlm.utils.messages import quote_value, suggest_name

TARGET, PARTIAL = "_target_", "_partial_"
_NONE = type(None)
PLAIN = ("builtins", "typing", "collections.abc", "types")  # modules whose classes are no plug-ins


@dataclass(frozen=True)
class Call:
    """A checked node: what to call, with which values, now or later."""

    target: Callable[..., Any]
    arguments: dict[str, Any]
    where: str
    is_partial: bool


@dataclass(frozen=True)
class Wanted:
    """What an annotation admits: classes, called now or later, and an annotation of plain values, if any."""

    now: tuple[type, ...]
    later: tuple[type, ...]
    how: Deferred
    plain: Any

    @property
    def kinds(self) -> tuple[type, ...]:
        """All classes."""
        return self.now + self.later


def build(node: Any, hint: Any, *, where: str = "", plugins: Sequence[str] = ()) -> Any:
    """Check a config's node and make its objects.

    Args:
        node: plain values.
        hint: annotation of what is wanted.
        where: dotted name of the node, for messages.
        plugins: packages of plug-ins that the user allows.

    Raises:
        NotAllowedError: a node names something that a config may not, or stands where only plain values may.
        ConfigError: a name that its target does not take, a value of the wrong type, or one that the target refuses.
    """
    return make(parse(node, hint, where=where, plugins=plugins))


def make(parsed: Any) -> Any:
    """The objects of nodes that are checked."""
    if isinstance(parsed, dict):
        return {key: make(value) for key, value in parsed.items()}
    if isinstance(parsed, list):
        return [make(value) for value in parsed]
    if not isinstance(parsed, Call):
        return parsed
    arguments = make(parsed.arguments)
    if parsed.is_partial:
        return functools.partial(parsed.target, **arguments)
    try:
        return parsed.target(**arguments)
    except NestlmError as error:
        raise type(error)(_named(str(error), parsed)) from error
    except (TypeError, ValueError, ArithmeticError, IndexError, AttributeError) as error:
        name = getattr(parsed.target, "__qualname__", "the target")
        raise ConfigError(f"{parsed.where}: {name} refuses these values: {' '.join(str(error).split())}") from error


def _named(message: str, call: Call) -> str:
    """A target's own message, under the name that the config has for what it refuses."""
    group = call.where.partition(".")[0]
    if not group:
        return message
    if re.match(rf"{group}\b", message):
        return message
    field = re.match(r"[\w.]*?(\w+):", message)
    if field is not None and field.group(1) in call.arguments:
        return f"{_below(call.where, field.group(1))}:{message[field.end() :]}"
    return f"{group}.{message}"


def parse(value: Any, hint: Any, *, where: str, plugins: Sequence[str]) -> Any:
    """A value with every node below it replaced by a checked `Call`."""
    if isinstance(value, dict) and any(_is_magic(key) for key in value):
        return parse_node(value, hint, where=where, plugins=plugins)
    inner = _inner(hint, value)
    if inner is not None:
        parsed = [(key, parse(item, inner, where=_below(where, key), plugins=plugins)) for key, item in _items(value)]
        return dict(parsed) if isinstance(value, dict) else [item for _, item in parsed]
    refuse_nodes(value, where)
    if isinstance(value, int) and not isinstance(value, bool) and _takes_text(hint):
        value = str(value)  # a name of digits alone, such as a folder 2023, is a number for YAML and Hydra
    check_type(where, value, hint)
    return value


def parse_node(node: dict[str, Any], hint: Any, *, where: str, plugins: Sequence[str]) -> Call:
    """A checked node. Raises ConfigError where it names no class that may stand there, or a wrong parameter."""
    wanted = wanted_by(hint)
    if not wanted.kinds:
        refuse_nodes(node, where)
    others = [key for key in node if _is_magic(key) and key not in (TARGET, PARTIAL)]
    if others or TARGET not in node:
        raise NotAllowedError(
            f"{_below(where, (others or [PARTIAL])[0])}: wanted {TARGET} and fields of the class alone"
        )
    is_partial = node.get(PARTIAL, False)
    if not isinstance(is_partial, bool):
        raise NotAllowedError(f"{_below(where, PARTIAL)}: got {quote_value(is_partial)}, wanted true or false")
    target = locate(node[TARGET], wanted.kinds, where=where, plugins=plugins)
    if not (wanted.later if is_partial else wanted.now):
        cure = "true, since the run makes it later" if wanted.later else "it removed"
        raise ConfigError(f"{_below(where, PARTIAL)}: got {str(is_partial).lower()}, wanted {cure}")
    arguments = {key: value for key, value in node.items() if not _is_magic(key)}
    return parse_call(target, arguments, where=where, plugins=plugins, later=wanted.how if is_partial else None)


def parse_call(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    where: str,
    plugins: Sequence[str] = (),
    later: Deferred | None = None,
) -> Call:
    """A call of a target that is allowed, with checked arguments; `later` says how it is called when it is not now."""
    hints = parameters_of(target, where=where, how=later or Deferred(), arguments=arguments)
    parsed = {
        name: parse(value, hints.get(name, Any), where=_below(where, name), plugins=plugins)
        for name, value in arguments.items()
    }
    return Call(target, parsed, where, is_partial=later is not None)


def parameters_of(
    target: Callable[..., Any], *, where: str, how: Deferred, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Annotations of a target's parameters. Raises ConfigError where arguments lack one, or name another."""
    parameters = inspect.signature(target).parameters
    hints = type_hints(target, where=where)
    names = [name for name, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    if how.takes is not None:
        hints = typing.get_type_hints(how.takes, include_extras=True)
    takes_any = how.takes is None and any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    known = [name for name in (names if how.takes is None else hints) if name not in how.given]
    for name in arguments:
        if name in how.given or (how.takes is not None and name in names and name not in known):
            raise ConfigError(
                f"{_below(where, name)}: the stages of a run decide that themselves; remove it (lengths and rates are "
                "STAGE.steps and STAGE.lr)"
            )
        if name not in known and not takes_any:
            raise ConfigError(f"{_below(where, name)}: {_name(target)} takes no {name!r}{suggest_name(name, known)}")
    for name in names:
        if name not in arguments and name not in how.given and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{_below(where, name)}: has no value; {_name(target)} wants one")
    return hints


def type_hints(target: Callable[..., Any], *, where: str) -> dict[str, Any]:
    """Annotations of a callable's parameters; none for a class of another package that cannot resolve its own.

    Raises:
        ConfigError: a class of ours, or of a plug-in, has annotations without a meaning: nothing could be checked.
    """
    source: Any = target
    if inspect.isclass(target):
        owner = next(kind for kind in target.__mro__ if "__init__" in vars(kind))
        source = owner if "__dataclass_params__" in vars(owner) else owner.__init__
    try:
        return typing.get_type_hints(source, include_extras=True)
    except (NameError, TypeError) as error:
        if any(_is_foreign(target, names) for names in FOREIGN.values()):
            return {}  # and then no node may stand in it
        raise ConfigError(f"{where}: cannot resolve the annotations of {_name(target)}: {error}") from error


def wanted_by(hint: Any) -> Wanted:
    """What an annotation admits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = wanted_by(arguments[0])
        how = next((each for each in arguments[1:] if isinstance(each, Deferred)), found.how)
        return dataclasses.replace(found, how=how)
    if origin in (Union, types.UnionType):
        parts = [wanted_by(part) for part in arguments]
        plain = [part.plain for part in parts if part.plain is not None]
        return Wanted(
            sum((part.now for part in parts), ()),
            sum((part.later for part in parts), ()),
            next((part.how for part in parts if part.later), Deferred()),
            Union[tuple(plain)] if plain else None,  # noqa: UP007 (made of a list)
        )
    if origin is not None and full_name(origin) == "collections.abc.Callable":
        return Wanted((), wanted_by(arguments[-1]).now if len(arguments) == 2 else (), Deferred(), None)
    if origin is None and inspect.isclass(hint) and hint.__module__ not in PLAIN:
        return Wanted((hint,), (), Deferred(), None)
    return Wanted((), (), Deferred(), hint)


def check_type(where: str, value: Any, hint: Any) -> None:
    """Raise ConfigError when a plain value is not what the annotation says."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    wanted = wanted_by(hint)
    if wanted.plain is None or (wanted.kinds and wanted.plain is types.NoneType and value is not None):
        names = " or ".join(kind.__name__ for kind in wanted.kinds)
        cure = f"a node whose {TARGET} names one" if "." in where else f"{where}=NAME"
        raise ConfigError(f"{where}: got {quote_value(value)}, wanted a {names}: {cure}")
    held = [kind.__name__ for part in get_args(wanted.plain) for kind in wanted_by(part).kinds]
    if held:
        raise ConfigError(f"{where}: got {quote_value(value)}, wanted a mapping or a list of {' or '.join(held)}")
    adapter = TypeAdapter(wanted.plain, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=not isinstance(value, list | dict))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{where}: got {quote_value(value)}, wanted {spelled(wanted.plain)}; {reason}") from None


def spelled(hint: Any) -> str:
    """An annotation as messages write it."""
    if inspect.isclass(hint) and get_origin(hint) is None:
        return "null" if hint is types.NoneType else hint.__name__
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(spelled(part) for part in get_args(hint))
    return str(hint).replace("collections.abc.", "").replace("typing.", "")


def refuse_nodes(value: Any, where: str) -> None:
    """Raise NotAllowedError for a node among plain values."""
    if isinstance(value, dict) and any(_is_magic(key) for key in value):
        raise NotAllowedError(f"{where}: got a node with {_magic_of(value)}, wanted plain values: no class stands here")
    for key, item in _items(value):
        refuse_nodes(item, _below(where, key))


def _inner(hint: Any, value: Any) -> Any:
    """The annotation of what a mapping or a list holds, where classes may stand in it; None otherwise."""
    if get_origin(hint) is Annotated:
        return _inner(get_args(hint)[0], value)
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for part in get_args(hint) if (found := _inner(part, value)) is not None), None)
    origin, arguments = get_origin(hint), get_args(hint)
    if not inspect.isclass(origin) or not arguments:
        return None
    of_mapping = isinstance(value, dict) and issubclass(origin, Mapping)
    of_list = isinstance(value, list) and issubclass(origin, Sequence)
    inner = arguments[1 if of_mapping else 0] if of_mapping or of_list else None
    if inner is None or not wanted_by(inner).kinds:
        return None
    return inner


def _takes_text(hint: Any) -> bool:
    """Whether an annotation wants a text, or nothing, and no number."""
    plain = wanted_by(hint).plain
    return plain is str or (get_origin(plain) in (Union, types.UnionType) and set(get_args(plain)) == {str, _NONE})


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a mapping, or positions and items of a list."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _below(where: str, key: Any) -> str:
    """The dotted name of a field, or of an item of a list."""
    return f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}".lstrip(".")


def _is_magic(key: Any) -> bool:
    """Whether a key is an instruction to make an object: `_target_` and its relatives."""
    return isinstance(key, str) and len(key) > 2 and key.startswith("_") and key.endswith("_")


def _magic_of(node: Mapping[str, Any]) -> str:
    """The first instruction among a node's keys."""
    return next(key for key in node if _is_magic(key))


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", repr(target))


def _is_foreign(target: Any, names: Sequence[str]) -> bool:
    """Whether a class is one of the listed ones of other packages."""
    top = full_name(target).partition(".")[0]
    return any(name.partition(".")[0] == top and name.rpartition(".")[2] == _name(target) for name in names)
