"""Names that a checkpoint folder uses; nothing heavy is imported here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

EDITS_FILE = "coprune_edits.json"
"""What was done to the model of a folder, beside its weights."""
QUANT_METHOD = "coprune"
"""What the configuration of a packed folder calls its way of storing weights."""


def kinds_of(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers only as one each, with how many they are, the most frequent first."""
    kinds = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return [f"{kind} ({count:,})" if count > 1 else kind for kind, count in kinds.most_common()]
