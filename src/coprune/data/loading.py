"""datasets' own loading, as loud as all else that fetches files."""

from __future__ import annotations

from typing import Any


def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, whose bars are hidden where those of the Hub's downloads are. Raises what it raises."""
    from datasets.load import load_dataset  # slow to import, and only some data needs it
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled as downloads_are_quiet

    hides = downloads_are_quiet() and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        return load_dataset(path, name, **options)
    finally:
        if hides:
            enable_progress_bars()
