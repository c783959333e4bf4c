"""Draw the pictures in docs/diagrams: boxes and arrows, narrow enough for a phone, readable on white and on black.

python docs/site/diagrams.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "diagrams"
WIDTH = 480
# Filled boxes with white letters need no background; lines and frames are of a grey that shows on both.
MODEL, DATA, DONE, TITLE, LINE = "#3949ab", "#00695c", "#8e4a00", "#546e7a", "#808080"
_HEIGHT, _STEP, _LETTERS = 40, 19, 15


@dataclass(frozen=True)
class Box:
    """A filled box with lines of text, positioned by its upper left corner."""

    x: float
    y: float
    width: float
    text: str
    color: str = MODEL

    @property
    def height(self) -> float:
        return _HEIGHT + _STEP * self.text.count("\n")

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height

    def drawn(self) -> str:
        lines = self.text.split("\n")
        first = self.y + self.height / 2 - _STEP * (len(lines) - 1) / 2 + 5
        letters = "".join(
            f'<text x="{self.middle:g}" y="{first + _STEP * i:g}">{escape(line)}</text>' for i, line in enumerate(lines)
        )
        shape = f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="6"'
        return f'{shape} fill="{self.color}"/>{letters}'


@dataclass
class Drawing:
    """The shapes of a picture, in drawing order."""

    title: str
    parts: list[str] = field(default_factory=list)
    bottom: float = 0

    def box(self, x: float, y: float, width: float, text: str, color: str = MODEL) -> Box:
        made = Box(x, y, width, text, color)
        self.parts.append(made.drawn())
        self.bottom = max(self.bottom, made.bottom)
        return made

    def line(self, *points: tuple[float, float], arrow: bool = True) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2"{end}/>')

    def down(self, above: Box, below: Box) -> None:
        self.line((below.middle, above.bottom), (below.middle, below.y - 2))

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="10"'
        self.parts.append(f'{shape} fill="none" stroke="{LINE}" stroke-width="2" stroke-dasharray="6 5"/>')
        self.bottom = max(self.bottom, y + height)

    def words(self, x: float, y: float, text: str) -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{LINE}">{escape(text)}</text>')

    def svg(self) -> str:
        height = self.bottom + 8
        tip = f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" font-family="system-ui, sans-serif" font-size="{_LETTERS}" '
            f'fill="white" text-anchor="middle"><title>{escape(self.title)}</title><defs><marker id="tip" '
            f'markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto" markerUnits="userSpaceOnUse">'
            f"{tip}</marker></defs>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def walk() -> Drawing:
    """Draw the loop over blocks, in `block` propagation."""
    d = Drawing("The walk over blocks")
    text = d.box(110, 8, 260, "calibration text", DATA)
    record = d.box(70, 76, 340, "record the arguments of all blocks,\nprove that they can be replayed")
    inputs = d.box(110, 163, 260, "inputs of a block", DATA)
    run = d.box(70, 261, 340, "run the dense block,\nadd each matrix's inputs to a statistic")
    prune = d.box(70, 348, 340, "the method chooses zeros,\nrefinements adjust kept weights")
    again = d.box(70, 435, 340, "run the pruned block:\nthe inputs of the next one")
    write = d.box(70, 522, 340, "write it, with a checksum", DONE)
    d.frame(20, 227, 440, 355)
    d.words(122, 250, "for every block")
    reload = d.box(110, 614, 260, "reload the model, compare")
    done = d.box(110, 682, 260, "checkpoint, report, page", DONE)
    boxes = [text, record, inputs, run, prune, again, write, reload, done]
    for above, below in pairwise(boxes):
        d.down(above, below)
    # Back to the inputs, for the next block.
    d.line((410, 464), (436, 464), (436, 183), (374, 183))
    return d


def propagation() -> Drawing:
    """Draw what each kind of propagation runs, from a block's inputs to its outputs."""
    d = Drawing("Three kinds of propagation")
    rows = {
        "block: two passes over a block": ["run dense,\nstatistics", "prune", "run\npruned"],
        "sequential: one pass": ["each matrix:\nstatistics, prune, run"],
        "dense: one pass": ["run dense, statistics,\nthen prune behind it"],
    }
    for row, (title, steps) in enumerate(rows.items()):
        y = 8 + 134 * row
        d.box(8, y, 464, title, TITLE)
        before = d.box(8, y + 63, 70, "inputs", DATA)
        width = (296 - 16 * (len(steps) - 1)) / len(steps)
        ends = [
            d.box(92 + i * (width + 16), y + 54 + 9 * ("\n" not in step), width, step) for i, step in enumerate(steps)
        ]
        for box in [*ends, d.box(402, y + 63, 70, "outputs", DATA)]:
            d.line((before.x + before.width, y + 83), (box.x - 2, y + 83))
            before = box
    return d


def proof() -> Drawing:
    """Draw the real forward beside the replay."""
    d = Drawing("The proof: one real forward beside the replay")
    d.box(8, 8, 190, "one real forward", TITLE)
    d.box(282, 8, 190, "the replay", TITLE)
    names = ["embedding", "block 1", "block 2", "block 3 …", "logits"]
    real = [d.box(8, 68 + 66 * i, 190, name, DATA if i in (0, 4) else MODEL) for i, name in enumerate(names)]
    told = ["recorded call 1", "recorded call 2", "recorded call 3 …", "logits"]
    replayed = [d.box(282, 134 + 66 * i, 190, name, DATA if i == 3 else MODEL) for i, name in enumerate(told)]
    for column in (real, replayed):
        for above, below in pairwise(column):
            d.down(above, below)
    first, begin = real[0], replayed[0]
    d.line((first.x + first.width, first.y + 20), (begin.middle, first.y + 20), (begin.middle, begin.y - 2))
    for left, right in zip(real[1:], replayed, strict=True):
        d.box(224, left.y, 32, "=", DONE)
        d.line((198, left.y + 20), (224, left.y + 20), arrow=False)
        d.line((256, right.y + 20), (282, right.y + 20), arrow=False)
    return d


def rooms() -> Drawing:
    """Draw the rooms, each above those that it uses."""
    d = Drawing("The rooms of the code: each uses those below it")
    told = {
        "commands": "one command, one file",
        "fitting": "the smallest model that still does a task",
        "sweeps": "many runs from one file, local or on Ray",
        "runner": "the steps of a recipe, one after another",
        "steps": "prune, remove, trim, train, export: from model to model",
        "stages": "what steps that walk over blocks share",
        "removal": "remove channels, heads, experts and blocks",
        "run": "what the stages of a run find, and its output",
        "training": "adapters, dense training, distillation",
        "report": "report.json, the page, the model card",
        "vocabulary": "remove tokens and their rows",
        "evaluation": "perplexity, tasks, answers, comparison",
        "pruning": "methods, refinements, allocations",
        "gguf_files": "GGUF files, read and written; llama.cpp",
        "model": "open, walk, edit and write a model",
        "data": "text and images to calibrate and measure on",
        "recipe": "settings as data, without torch",
        "store": "results under keys of contents: claims, notes, places",
        "base": "errors, files, memory, processes, kernels",
    }
    for i, (room, words) in enumerate(told.items()):
        d.box(8, 8 + 46 * i, 464, f"{room}: {words}", TITLE if room in ("base", "store", "recipe", "data") else MODEL)
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "walk.svg": walk,
    "propagation.svg": propagation,
    "proof.svg": proof,
    "rooms.svg": rooms,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw().svg(), encoding="utf-8")
