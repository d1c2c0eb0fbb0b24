"""Draw overrides, good and bad, from the config's own schema: each must work, or be refused in a line or two.

python benchmarks/schema_overrides.py --number 500 --seed 0 model=tiny   # prints what ends in a traceback
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from nestlm.config.allowlist import plugins_of
from nestlm.config.compose import build, compose, with_sizes
from nestlm.config.error_messages import USER_ERRORS, explain
from nestlm.pipeline.checks import check
from nestlm.train.trainer import check_trainer
from nestlm.utils.nested_dict import flat_items

VALUES = (
    "null", "0", "5", "-1", "1.5", "true", '""', "abc", "[]", "{}", "[1]", "{a: 1}", "nan", "inf", "-inf", "1e400",
    "1e-400", "99999999999999999999", "1000000", "${foo}", "${oc.env:NO_SUCH_VARIABLE}", "???", "../x", "a=b", "a(b)",
    "[nan]",
)  # fmt: skip
TARGETS = (
    "", "5", "os.system", "builtins.eval", "nestlm", "nestlm.train.stage_settings.torch", "null", "a b", "..os.system",
    "${seed}"
)  # fmt: skip


def overrides_of(base: list[str]) -> Iterator[str]:
    """Yield overrides for a config's keys: deletions, values of all kinds, unknown fields and other classes."""
    for key, value in [*flat_items(compose(base)), *((group, {}) for group in ("experiment", "debug", "launcher"))]:
        if key.endswith("_target_"):
            yield from (f"{key}={target}" for target in TARGETS)
            continue
        yield f"~{key}"
        yield from (f"{key}={text}" for text in VALUES)
        if isinstance(value, dict):
            yield from (f"+{key}.foo=1", f"+{key}._args_=[1]", f"++{key}._target_=os.system", f"{key}=no_such_option")
        else:
            yield from (f"+{key}.foo=1", f"{key}={{_target_: os.getcwd}}", f"+{key}=1")


def outcome(base: list[str], override: str) -> str | None:
    """Return None where a dry run accepts the overrides, else the error message. Bugs are raised."""
    try:
        plain = with_sizes(compose([*base, override]))
        settings = build(plain, plugins=plugins_of(plain))
        check(settings)
        check_trainer(settings.trainer)
    except USER_ERRORS as error:
        return explain(error)
    return None


def fault(said: str | None) -> str | None:
    """Return the fault in an error message, or None."""
    if said is None:
        return None
    lines = said.splitlines()
    if not 1 <= len(lines) <= 2:
        return f"{len(lines)} lines"
    if len(said) > 700:
        return f"{len(said)} characters"
    return "a traceback" if "Traceback" in said else None


def tried(base: list[str], *, number: int, seed: int) -> Iterator[tuple[str, str | None, str | None]]:
    """Try a number of drawn overrides; yields each with its message and the fault in it."""
    every = list(overrides_of(base))
    for override in random.Random(seed).sample(every, min(number, len(every))):
        try:
            said = outcome(base, override)
        except Exception as error:  # noqa: BLE001 (whatever it is, a user would see it)
            yield override, None, f"{type(error).__name__}: {traceback.format_exc().strip().splitlines()[-1]}"
        else:
            yield override, said, fault(said)


def main() -> None:
    """Print the faults, and a count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="Print every override and what is said.")
    parser.add_argument("base", nargs="*")
    options = parser.parse_args()
    found: list[Any] = list(tried(options.base, number=options.number, seed=options.seed))
    for override, said, wrong in found:
        if wrong or options.all:
            print(f"{override}: {wrong or said or 'works'}")
    wrong = sum(1 for *_, each in found if each)
    print(f"{len(found)} tried, {sum(1 for _, said, _ in found if said)} refused, {wrong} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
