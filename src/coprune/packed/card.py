"""What the card of a packed folder says: how it is stored, and what loads it; and that of what was unpacked."""

from __future__ import annotations

import re

IMPORT = "import coprune  # lets transformers load packed weights\n"
STORED = {
    "dense": "The weights are stored dense, so any tool that loads the original loads this.",
    "packed": "The weights are stored packed: `pip install coprune`, and `import coprune` before transformers loads this folder. "
    "`coprune unpack FOLDER DENSE` makes a dense folder of it that needs no coprune.",
}
"""How weights are stored, by the encoding."""


def packed_card(card: str) -> str:
    """The card of a dense folder as that of the packed one: it says how to load, first of all if nothing else did."""
    said = card.replace(STORED["dense"], STORED["packed"])
    said = re.sub(r"^(```python\n)(?=from transformers import)", rf"\1{IMPORT}", said, count=1, flags=re.MULTILINE)
    if STORED["packed"] in said:
        return said
    head = re.match(r"\s*---\n.*?\n---\n", said, flags=re.DOTALL)
    end = head.end() if head else 0
    return f"{said[:end]}\n> {STORED['packed']}\n\n{said[end:].lstrip()}"


def dense_card(card: str) -> str:
    """The card of a folder that a run wrote packed as that of a dense one."""
    return card.replace(STORED["packed"], STORED["dense"]).replace(IMPORT, "")
