"""Draw overrides with typical mistakes from the config's own keys, groups and values."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from nestlm.config.compose import compose
from nestlm.config.groups import CONF
from nestlm.utils.nested_dict import flat_items

VALUES = (
    "null", "", "abc", "-1", "0", "1", "0.5", "-0.5", "1.5", "1e-30", "1e30", "1e400", "nan", "inf", "-inf", "true",
    "false", "[]", "{}", "[1,2]", "[null]", "[[1]]", "{a:1}", "{a:{b:[]}}", "'5'", "'nan'", "99999999999999999999",
    "1000000", "-9223372036854775809", "0x10", "1_000", "\u00fc\u6f22", "'a b'", "a:b", "..", "/", "~", "'\\n'",
    "x" * 10_000,     "[" + "1," * 3000 + "1]", "${seed}", "${nowhere}", "${oc.env:NOWHERE}", "???",
)  # fmt: skip
TARGETS = (
    "", "null", "5", "[]", "{}", "x", "os.system", "builtins.eval", "nestlm", "nestlm.", ".nestlm", "nestlm..spec",
    "nestlm.nowhere.X", "nestlm.train.stage_settings.Nowhere", "nestlm.train.stage_settings.Settings",
    "torch.nn.Linear", "torch.load",
    "nowhere.at.all", "'nestlm.train.stage_settings.Settings '", "nestlm.config.commands.train",
    "lightning.pytorch.Trainer",
    "subprocess.Popen", "numpy.testing.runstring", "__main__.x", "nestlm.router.static.logits.Router",
)  # fmt: skip
SYNTAX = (
    "=", "=5", "5", "foo", "a b=c", "seed=[", "seed={", "seed=(", "seed='", 'seed="', "seed=a=b", "seed=1,2", "~", "~=",
    "+", "++", "+=", "@", "seed@=1", "seed@seed=1", "~seed=1", "-m", "--cfg", "seed =1", "seed= 1", "seed\t=1",
    "seed=$", "seed=${", "seed=#", "seed=\\", "..=1", ".=1", "seed.=1", ".seed=1", "seed[0]=1", "budget[0]=1",
    "budget.0=1", "seed=range(3)", "seed=choice(1,2)", "seed=interval(0,1)", "seed=glob(*)", "seed=float(x)",
    "defaults=[]", "_target_=os.system", "+_target_=os.system", "hydra=null", "hydra.run.dir=null",
    "hydra/launcher=nowhere", "hydra.callbacks=null", "~hydra", "hydra.sweeper=null",
)  # fmt: skip
BUDGETS = (
    "0", "-1", "2", "nan", "inf", "'60%'", "'0%'", "'101%'", "'nan%'", "'5parsec'", "'3MB'", "'-3MB'", "'1e999flops'",
    "'0.5memory'", "'memory'", "[]", "[[]]", "[[0.6],[0.6]]", "[0.6,0.6]", "[[0.6,0.7]]", "[null]", "{}", "[{}]",
    "[[[0.6]]]", "'0.6+8GiB'", "[true]", "['']", "[1e-300]", "['1params']", "[0.5,'0.5active_params','9e99params']",
)  # fmt: skip


@cache
def schema() -> tuple[tuple[str, Any], ...]:
    """Return keys and values of the default config, and of every option that differs from it."""
    found = {}
    for choice in ([], ["router=value"], ["router=evolution"], ["data=hub"], ["cost=memory"], ["optim=adamw_8bit"]):
        extra = ["data.name=x"] if choice == ["data=hub"] else []
        try:
            found |= dict(flat_items(compose([*choice, *extra])))
        except Exception:  # noqa: BLE001 (an option that wants more; the others have keys enough)
            continue
    return tuple(sorted((key, value) for key, value in found.items() if not key.endswith("_partial_")))


def keys() -> list[str]:
    """Return the names of plain values."""
    return [key for key, _ in schema() if not key.endswith("_target_")]


def nodes() -> list[str]:
    """Return the names of nodes, which hold values."""
    return sorted({key.rpartition(".")[0] for key, _ in schema()} - {""})


def groups() -> list[str]:
    """Return the names of config groups."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def misspelled(rng: random.Random, name: str) -> str:
    """Return a name with one letter lost, doubled, or swapped with the next one."""
    at = rng.randrange(len(name))
    return rng.choice((name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name[:at] + name[at : at + 2][::-1]
                       + name[at + 2 :]))  # fmt: skip


KINDS: Mapping[str, Callable[[random.Random], str]] = {
    "a value": lambda rng: f"{rng.choice(keys())}={rng.choice(VALUES)}",
    "a number": lambda rng: f"{rng.choice(numbers())}={rng.choice(VALUES[3:15])}",
    "a group": lambda rng: f"{rng.choice(groups())}={rng.choice(VALUES[:30])}",
    "a node": lambda rng: f"{rng.choice(nodes())}={rng.choice(VALUES[:30])}",
    "left out": lambda rng: f"~{rng.choice([*keys(), *nodes(), *groups()])}",
    "added": lambda rng: (
        f"{rng.choice(('+', '++'))}{rng.choice(nodes())}.{rng.choice(('foo', 'lr', 'name'))}={rng.choice(VALUES[:30])}"
    ),
    "a target": lambda rng: f"{rng.choice(('', '+', '++'))}{rng.choice(nodes())}._target_={rng.choice(TARGETS)}",
    "a whole node": lambda rng: f"++{rng.choice(nodes())}={{_target_:{rng.choice(TARGETS[1:])}}}",
    "misspelled": lambda rng: f"{misspelled(rng, rng.choice([*keys(), *groups()]))}=1",
    "a budget": lambda rng: f"budget={rng.choice(BUDGETS)}",
    "syntax": lambda rng: rng.choice(SYNTAX),
}


def numbers() -> list[str]:
    """Return the names of numeric values."""
    return [key for key, value in schema() if isinstance(value, int | float) and not isinstance(value, bool)]


def bad_override(seed: int, number: int) -> tuple[str, str]:
    """Draw a kind of mistake; returns the kind and an override with that mistake."""
    rng = random.Random(f"{seed}/override/{number}")
    kind = list(KINDS)[number % len(KINDS)]
    return kind, KINDS[kind](rng)


def command(override: str) -> list[str]:
    """Return the command line around an override."""
    named = override.lstrip("+~").partition("=")[0]
    return ["dry_run=true", *(["data=synthetic"] if named != "data" else []), override]
