"""The documentation: links lead somewhere, and the picture of the pipeline is the one that its script draws."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestlm.config.compose import compose
from nestlm.pipeline.order import STAGES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^ *```.*?^ *```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
BASH = re.compile(r"^ *```bash\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
OWN = re.compile(r"^`[\w/]+\.(?:py|yaml)`", flags=re.MULTILINE)  # a page that adds files has commands that need them


def commands() -> Iterator[str]:
    """Yield every command line of the pages that starts a single run, without comments."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in [] if OWN.search(text) else BASH.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.partition(" #")[0].strip()
                is_template = any(name in command for name in ("...", "torchrun", "-m ", "plugins="))
                if command.startswith("python train.py") and not is_template:
                    yield command


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        if name.startswith(("http://", "https://")):
            continue
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("command", sorted({*commands()}))
def test_commands_compose(command):
    assert compose(shlex.split(command)[2:])


def test_the_picture_of_the_pipeline_is_what_its_script_draws():
    drawing = runpy.run_path(str(ROOT / "docs/draw_pipeline.py"))
    assert drawing["PICTURE"].read_text(encoding="utf-8") == drawing["draw"](), "run python docs/draw_pipeline.py"
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert "(images/pipeline.svg)" in page
    described = re.findall(r"^\| `(\w+)` \| \w", page.partition("## ")[0], flags=re.MULTILINE)
    drawn = [stage.name for stage in (drawing["PROFILE"], *drawing["STAGES"])]
    assert drawn == described == [stage.name for stage in STAGES]
