"""The pattern of docs/adding-a-pattern.md, of which the program knows nothing: blocks of inputs kept or pruned whole."""

from __future__ import annotations

from support.page_code import named_in

Blocks = named_in("adding-a-pattern.md", "Blocks")
