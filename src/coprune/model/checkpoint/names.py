"""Names that a checkpoint folder uses; nothing heavy is imported here."""

from __future__ import annotations

QUANT_METHOD = "coprune"
"""What the configuration of a packed folder calls its way of storing weights."""
