"""The pattern of docs/adding-a-pattern.md, which is not built in: whole blocks of inputs are kept or pruned."""

from __future__ import annotations

from support.page_code import named_in

Blocks = named_in("adding-a-pattern.md", "Blocks")
