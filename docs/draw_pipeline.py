"""Draw docs/images/pipeline.svg: the stages of a run, what each leaves, and what a finished run is for.

python docs/draw_pipeline.py
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "images/pipeline.svg"
WIDTH, HEIGHT = 1180, 520
STAGE_WIDTH, GAP, LEFT, TOP = 140, 22, 32, 134
INK, FAINT, LINE = "#1f2933", "#52606d", "#7b8794"
FILLS = {
    "input": "#f0f4f8",
    "stage": "#dcebfa",
    "optional": "#ffffff",
    "files": "#ffffff",
    "store": "#fdf3d7",
    "use": "#dff3e4",
}


@dataclass(frozen=True)
class Stage:
    """A stage's box: its name, what it does and which files it leaves, each a list of short lines."""

    name: str
    does: tuple[str, ...]
    leaves: tuple[str, ...]


STAGES = (
    Stage("data", ("split documents,", "tokenize, pack"), ("tokenizer.json", "token shards")),
    Stage("pretrain", ("train the teacher, or", "read model.weights"), ("model.safetensors",)),
    Stage("rank", ("score units and sort", "them by importance"), ("model.safetensors", "importance.safetensors")),
    Stage("elastic", ("train sampled", "sub-networks"), ("model.safetensors", "record.safetensors")),
    Stage("router", ("learn which choices", "suit a budget"), ("router.safetensors",)),
    Stage("joint", ("tune model and", "router together"), ("model.safetensors", "router.safetensors")),
    Stage("evaluate", ("choose and score", "every budget"), ("score-*.json",)),
)
PROFILE = Stage("profile", ("measure latency;", "with cost=latency"), ("latency_table.json",))
USES = (
    ("nestlm generate", "text at any budget"),
    ("nestlm evaluate", "loss, tasks of lm-eval"),
    ("nestlm export", "transformers, GGUF"),
    ("nestlm report", "tables over many runs"),
    ("nestlm verify", "run again, compare"),
)


def text(
    x: float, y: float, content: str, *, size: int = 12, color: str = INK, weight: str = "normal", mono: bool = False
) -> str:
    """Return one centred line of text."""
    family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, Helvetica, Arial, sans-serif"
    style = f'font-family="{family}" font-size="{size}" font-weight="{weight}" fill="{color}"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {style}>{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, *, fill: str, dashed: bool = False) -> str:
    """Return a rectangle with round corners."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
        f'fill="{FILLS[fill]}" stroke="{LINE}"{dash}/>'
    )


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """Return a line through points that ends in an arrowhead."""
    path = " ".join(f"{'ML'[number > 0]}{x:g},{y:g}" for number, (x, y) in enumerate(points))
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"{dash}/>'


def stage_box(stage: Stage, x: float, y: float, *, optional: bool = False) -> list[str]:
    """Return a stage's box with its name and its task."""
    middle = x + STAGE_WIDTH / 2
    parts = [box(x, y, STAGE_WIDTH, 76, fill="optional" if optional else "stage", dashed=optional)]
    parts.append(text(middle, y + 24, stage.name, size=15, weight="bold"))
    return parts + [text(middle, y + 44 + 17 * row, line, color=FAINT) for row, line in enumerate(stage.does)]


def files_box(stage: Stage, x: float, y: float) -> list[str]:
    """Return the box of the files that a stage leaves."""
    parts = [box(x, y, STAGE_WIDTH, 48, fill="files")]
    first = y + (29 if len(stage.leaves) == 1 else 20)
    rows = enumerate(stage.leaves)
    return parts + [text(x + STAGE_WIDTH / 2, first + 17 * row, name, size=10, mono=True) for row, name in rows]


def stages() -> list[str]:
    """Return the row of stages, with inputs above and files below."""
    parts, step = [], STAGE_WIDTH + GAP
    for number, stage in enumerate(STAGES):
        x = LEFT + number * step
        middle = x + STAGE_WIDTH / 2
        parts += stage_box(stage, x, TOP) + files_box(stage, x, TOP + 100)
        parts.append(arrow((middle, TOP + 76), (middle, TOP + 98)))
        parts.append(arrow((middle, TOP + 148), (middle, TOP + 170)))
        if number:
            parts.append(arrow((x - GAP, TOP + 38), (x - 2, TOP + 38)))
    inputs = (("your text", "data.path=FOLDER"), ("your weights", "model.weights=FOLDER"))
    for number, (name, how) in enumerate(inputs):
        x = LEFT + number * step
        middle = x + STAGE_WIDTH / 2
        parts += [box(x, 40, STAGE_WIDTH, 52, fill="input", dashed=number == 1)]
        parts += [text(middle, 62, name, size=13, weight="bold"), text(middle, 80, how, size=10, color=FAINT)]
        parts.append(arrow((middle, 92), (middle, TOP - 2), dashed=number == 1))
    router = LEFT + 4 * step
    parts += stage_box(PROFILE, router, 20, optional=True) + files_box(PROFILE, router + step, 34)
    parts.append(arrow((router + STAGE_WIDTH / 2, 96), (router + STAGE_WIDTH / 2, TOP - 2), dashed=True))
    parts.append(arrow((router + STAGE_WIDTH, 58), (router + step - 2, 58), dashed=True))
    return parts


def stores() -> list[str]:
    """Return the cache, the run's folder, and the commands that read it."""
    width, y, middle = WIDTH - 2 * LEFT, TOP + 172, WIDTH / 2
    parts = [box(LEFT, y, width, 46, fill="store")]
    parts.append(text(middle, y + 20, "cache/STAGE-KEY/", size=13, weight="bold", mono=True))
    why = "KEY is the hash of what determines the result: settings, earlier stages, text, weights, source code"
    parts.append(text(middle, y + 37, why, color=FAINT))
    parts.append(arrow((middle, y + 46), (middle, y + 66)))
    parts.append(box(LEFT, y + 68, width, 46, fill="store"))
    parts.append(text(middle, y + 88, "runs/EXPERIMENT/RUN/", size=13, weight="bold", mono=True))
    holds = "results.csv, specs/BUDGET.json, report.md, config.yaml, checkpoints/: complete without the cache"
    parts.append(text(middle, y + 105, holds, color=FAINT))
    each = (width - GAP * (len(USES) - 1)) / len(USES)
    for number, (command, gives) in enumerate(USES):
        x = LEFT + number * (each + GAP)
        parts.append(arrow((x + each / 2, y + 114), (x + each / 2, y + 136)))
        parts.append(box(x, y + 138, each, 52, fill="use"))
        parts.append(text(x + each / 2, y + 160, command, size=13, weight="bold", mono=True))
        parts.append(text(x + each / 2, y + 178, gives, color=FAINT))
    return parts


def draw() -> str:
    """Return the whole picture as SVG."""
    head = '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        "<title>The stages of a run, what each leaves, and what a finished run is for</title>",
        f'<defs>{head}<path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *stages(),
        *stores(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
