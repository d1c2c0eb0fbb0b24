"""Build objects from the plain values of a config: every value is checked, then every object is built.

A mapping with `_target_` is a node: it names a class and holds its arguments. With `_partial_: true` the class is
called later, by the code that knows the other arguments. A node may stand only where the annotation of a parameter
wants such a class: `Sampler`, or `Callable[..., Router]` for one that is called later. Only checked classes are called.
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
PLAIN = ("builtins", "typing", "collections.abc", "types")  # modules whose classes are plain values


@dataclass(frozen=True)
class Call:
    """A checked node.

    Attributes:
        target: the class or function to call.
        arguments: checked values, with a `Call` for each node below.
        where: dotted name of the node, for messages.
        is_partial: the target is called later.
    """

    target: Callable[..., Any]
    arguments: dict[str, Any]
    where: str
    is_partial: bool


@dataclass(frozen=True)
class Wanted:
    """The values that an annotation admits.

    Attributes:
        now: classes whose objects may stand there.
        later: classes that may stand there uncalled.
        how: the arguments that `later` gets when it is called.
        plain: the annotation of plain values that may stand there; None: no plain value may.
    """

    now: tuple[type, ...]
    later: tuple[type, ...]
    how: Deferred
    plain: Any

    @property
    def kinds(self) -> tuple[type, ...]:
        """Every admitted class, called now or later."""
        return self.now + self.later


def build(node: Any, hint: Any, *, where: str = "", plugins: Sequence[str] = ()) -> Any:
    """Check plain values of a config and build the objects that their nodes describe.

    Args:
        node: plain values.
        hint: the annotation that they must satisfy.
        where: dotted name of the node, for messages.
        plugins: packages of plug-ins that the user allows.

    Raises:
        NotAllowedError: a node names a class that a config may not name, or stands where only plain values may.
        ConfigError: a target does not take a name, or a value has the wrong type, or a target refuses a value.
    """
    return make(parse(node, hint, where=where, plugins=plugins))


def make(parsed: Any) -> Any:
    """Build the objects of checked values.

    Args:
        parsed: what `parse` returned.

    Raises:
        NestlmError: a target refuses its arguments; the message names them as the config does.
    """
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
    """Put the config's name of a field before the message of the target that refuses its value."""
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
    """Check a value against an annotation, and replace every node in it by a `Call`.

    Raises:
        NotAllowedError, ConfigError: as `build`, but for what only a target can refuse.
    """
    if isinstance(value, dict) and any(_is_magic(key) for key in value):
        return parse_node(value, hint, where=where, plugins=plugins)
    inner = _inner(hint, value)
    if inner is not None:
        parsed = [(key, parse(item, inner, where=_below(where, key), plugins=plugins)) for key, item in _items(value)]
        return dict(parsed) if isinstance(value, dict) else [item for _, item in parsed]
    refuse_nodes(value, where)
    if isinstance(value, int) and not isinstance(value, bool) and _takes_text(hint):
        value = str(value)  # YAML and Hydra read a name of digits alone, such as a folder 2023, as a number
    check_type(where, value, hint)
    return value


def parse_node(node: dict[str, Any], hint: Any, *, where: str, plugins: Sequence[str]) -> Call:
    """Check a mapping that has `_target_`, and return its call.

    Raises:
        NotAllowedError, ConfigError: as `parse`.
    """
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
    """Check the arguments of a call.

    Args:
        target: an allowed class or function.
        arguments: plain values by parameter.
        where: dotted name of the node, for messages.
        plugins: packages of plug-ins that the user allows.
        later: how the target is called later; None: it is called now.

    Raises:
        NotAllowedError, ConfigError: as `parse`.
    """
    hints = parameters_of(target, where=where, how=later or Deferred(), arguments=arguments)
    parsed = {
        name: parse(value, hints.get(name, Any), where=_below(where, name), plugins=plugins)
        for name, value in arguments.items()
    }
    return Call(target, parsed, where, is_partial=later is not None)


def parameters_of(
    target: Callable[..., Any], *, where: str, how: Deferred, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the annotations of a target's parameters by name.

    Raises:
        ConfigError: the arguments lack a parameter without default, or name one that the target does not take.
    """
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
    """Return the annotations of a callable's parameters; {} for a listed class that cannot resolve its own.

    Raises:
        ConfigError: annotations of a class of nestlm or of a plug-in cannot be resolved, so nothing could be checked.
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
    """Read from an annotation which classes and which plain values it admits."""
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
    """Raise ConfigError if a plain value does not satisfy an annotation."""
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
    """Write an annotation for a message: `float or null`, `one of static, dynamic`."""
    if inspect.isclass(hint) and get_origin(hint) is None:
        return "null" if hint is types.NoneType else hint.__name__
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(spelled(part) for part in get_args(hint))
    return str(hint).replace("collections.abc.", "").replace("typing.", "")


def refuse_nodes(value: Any, where: str) -> None:
    """Raise NotAllowedError if there is a node among values that must be plain."""
    if isinstance(value, dict) and any(_is_magic(key) for key in value):
        raise NotAllowedError(f"{where}: got a node with {_magic_of(value)}, wanted plain values: no class stands here")
    for key, item in _items(value):
        refuse_nodes(item, _below(where, key))


def _inner(hint: Any, value: Any) -> Any:
    """Return the annotation of a container's items if classes may be among them; None otherwise."""
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
    """Tell whether an annotation is `str` or `str | None`."""
    plain = wanted_by(hint).plain
    return plain is str or (get_origin(plain) in (Union, types.UnionType) and set(get_args(plain)) == {str, _NONE})


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Return keys and values of a mapping, or positions and items of a list."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _below(where: str, key: Any) -> str:
    """Return the dotted name of a field below another, or of an item of a list."""
    return f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}".lstrip(".")


def _is_magic(key: Any) -> bool:
    """Tell whether a key has the form of `_target_`: an instruction to build an object."""
    return isinstance(key, str) and len(key) > 2 and key.startswith("_") and key.endswith("_")


def _magic_of(node: Mapping[str, Any]) -> str:
    """Return the first key of a node that has the form of `_target_`."""
    return next(key for key in node if _is_magic(key))


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", repr(target))


def _is_foreign(target: Any, names: Sequence[str]) -> bool:
    """Tell whether a class has one of the listed names; their packages may export it from another module."""
    top = full_name(target).partition(".")[0]
    return any(name.partition(".")[0] == top and name.rpartition(".")[2] == _name(target) for name in names)
