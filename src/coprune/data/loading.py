"""datasets' own loading, as loud as all else that fetches files."""

from __future__ import annotations

from typing import Any

from coprune.base.progress import bars_hidden


def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, whose bars are hidden where those of the Hub's downloads are. Raises what it raises."""
    from datasets import utils  # slow to import, and only some data needs it
    from datasets.load import load_dataset
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    with bars_hidden(utils, are_progress_bars_disabled()):
        return load_dataset(path, name, **options)
