"""Hash of the source code that determines a stage's result: the pipeline, a stage's plug-ins, and what they import."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

PACKAGE = __name__.partition(".")[0]
PLAIN = (str, bytes, int, float, complex, bool, type(None), Path)


def code_digest(value: Any, *, plugins: Iterable[str] = ()) -> str:
    """Hash the source of `pipeline/`, of the classes that a value is made of, and of all modules that these import.

    Versions of other packages are not part of it.

    Args:
        value: a stage.
        plugins: packages of the user, which count as this package does.
    """
    packages = frozenset({PACKAGE, *plugins})
    known = {name for name in used_modules(value) if name.partition(".")[0] in packages}
    return digest_modules(frozenset(known), packages)


@lru_cache(maxsize=64)
def digest_modules(modules: frozenset[str], packages: frozenset[str]) -> str:
    """Hash the source of the pipeline's modules, of more modules, and of what they import."""
    digest = hashlib.sha256()
    for name in sorted(closure({*pipeline_modules(), *modules}, packages=packages)):
        path = locate(name)
        assert path is not None, "a module of the closure has a file"
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def pipeline_modules() -> Iterator[str]:
    """Name every module of the `pipeline` package."""
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        yield ".".join((PACKAGE, *(part for part in parts if part != "__init__")))


def used_modules(value: Any, *, seen: set[int] | None = None) -> Iterator[str]:
    """Name the modules of all classes and functions that an object, its attributes and its items are made of."""
    seen = set() if seen is None else seen
    if isinstance(value, PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, type | FunctionType):
        yield value.__module__
        return
    inner: list[Any] = []
    if isinstance(value, partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, Mapping):
        inner = [*value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [*value]
    else:
        yield type(value).__module__
        inner = [*getattr(value, "__dict__", {}).values()]
    for each in inner:
        yield from used_modules(each, seen=seen)


def closure(modules: Iterable[str], *, packages: frozenset[str]) -> set[str]:
    """Return the modules of some packages that are imported, directly or not, by modules, themselves included."""
    found: set[str] = set()
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] not in packages or locate(name) is None:
            continue
        found.add(name)
        parent = name.rpartition(".")[0]
        waiting += [*imports(name), *([parent] if parent else [])]
    return found


@lru_cache(maxsize=4096)
def locate(module: str) -> Path | None:
    """Return the file of a module, or of a package's `__init__`; None where the name is of something else.

    Nothing is imported.
    """
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not rest:
        return None if spec.origin is None else Path(spec.origin)
    for root in spec.submodule_search_locations or ():
        place = Path(root, *rest)
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


@lru_cache(maxsize=4096)
def imports(module: str) -> frozenset[str]:
    """Name what the import statements of a module name, modules or not; statements for type checkers do not count.

    A package's `__init__` runs whenever a module of it is imported, but its functions do not: imports in them do not
    count.
    """
    path = locate(module)
    assert path is not None, "the module has a file"
    is_package = path.name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in statements(ast.parse(path.read_bytes()), into_functions=not is_package):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def statements(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """Yield the nodes below a node, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from statements(other, into_functions=into_functions)
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not into_functions:
            continue
        yield child
        yield from statements(child, into_functions=into_functions)
