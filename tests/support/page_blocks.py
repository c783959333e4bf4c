"""The code blocks of README.md and of all pages in docs/, and their commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("", "text", "bash", "sh", "shell", "console")
# A plain text block that does not begin with one of these is a drawing or a command's output.
PROGRAMS = ("coprune", "python", "pip", "make", "torchrun", "hf", "lm_eval", "git", "uv", "uvx", "pipx")
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+|~~~+) *(?P<language>[\w+-]*)[^\n`]*$")
_VARIABLE = re.compile(r"[A-Z_]+=\S*")
_OMITTED = ("…", "...")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page relative to the root, the line of its fence, its language, and its dedented text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Its location, for messages."""
        return f"{self.page}:{self.line}"

    def begins(self) -> str:
        """Its first line that is not blank."""
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")


@dataclass(frozen=True)
class Line:
    """A command in a block, split like in a shell."""

    block: Block
    words: tuple[str, ...]
    variables: tuple[str, ...] = ()
    """Assignments `NAME=value` before it."""

    @property
    def text(self) -> str:
        """The command on one line."""
        return " ".join(self.words)

    @property
    def program(self) -> str:
        """The program's name."""
        return self.words[0]


def read_blocks() -> list[Block]:
    """Return all blocks of all pages, in order."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [block for page in pages for block in blocks_of(page)]


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of one page, including indented ones in lists, notes and tabs."""
    name = str(page.relative_to(ROOT))
    opened: re.Match[str] | None = None
    begun, inside = 0, [""]
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened, begun, inside = fence, number, []
        elif fence is not None and fence["ticks"] == opened["ticks"] and not fence["language"]:
            yield Block(name, begun, opened["language"], textwrap.dedent("\n".join(inside)))
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"{name}: the block in line {begun} has no end"


def lines_of(block: Block) -> list[Line]:
    """Return the commands of a shell block; none for other blocks."""
    if block.language not in SHELLS:
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    elif block.language in ("", "text") and first_word(block) not in PROGRAMS:
        return []
    parts = [part for line in lines for part in _apart(shlex.split(line, comments=True))]
    return [_line(block, part) for part in parts if part]


def first_word(block: Block) -> str:
    """Return the first word of a block."""
    return next((word for word in block.text.split() if word != "$" and not _VARIABLE.fullmatch(word)), "")


def _line(block: Block, words: list[str]) -> Line:
    first = next((index for index, word in enumerate(words) if not _VARIABLE.fullmatch(word)), len(words))
    return Line(block, tuple(words[first:]), tuple(words[:first]))


def _apart(words: list[str]) -> Iterator[list[str]]:
    """Yield the commands of a line joined by &&, without dots that stand for more options."""
    command: list[str] = []
    for word in words:
        if word in ("&&", ";", "|"):
            yield command
            command = []
        elif word not in _OMITTED:
            command.append(word)
    yield command
