"""Files that the how-to pages show, as objects."""

import re
import sys
import types
from pathlib import Path
from typing import Any

HOWTO = Path(__file__).parents[1] / "docs/howto"


def shown(page: str, file: str) -> str:
    """The text of a file as a page shows it."""
    text = (HOWTO / f"{page}.md").read_text(encoding="utf-8")
    found = re.search(rf"^`{re.escape(file)}`[^\n]*\n\n```\w+\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page} shows {file}"
    return found[1]


def executed(page: str, file: str) -> Any:
    """The module that a page shows."""
    module = types.ModuleType(f"howto_{Path(file).stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(shown(page, file), file, "exec"), module.__dict__)
    return module


MLP_DROP = executed("add-an-axis", "src/nestlm/elastic/axes/mlp_drop.py").MLPDrop()
