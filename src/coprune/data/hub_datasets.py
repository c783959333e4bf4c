"""Text from datasets of the Hugging Face Hub: as the papers read them, or any other by its id.

Large datasets are streamed: only the first rows are read. If the Hub is unreachable and the dataset is not in the cache,
the error comes at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprune.base.environment import datasets_cache
from coprune.base.errors import BadInput
from coprune.base.progress import bars_hidden
from coprune.base.words import Set
from coprune.data.text import LOCAL_FILE_HINT, Documents, JoinedText, choose_text_column, join

REACH_SECONDS = 10.0


@dataclass(frozen=True)
class Part:
    """The rows of a dataset to read, and how to join them to text."""

    splits: tuple[str, ...]
    """The first of these splits that the dataset has."""
    separator: str | None
    """Separator between rows; None keeps them apart as documents."""
    file: str | None = None
    """The file of the dataset with these rows."""
    first_rows: int | None = None
    """Stream, and stop after this many rows."""
    first_characters: int | None = None
    """Stream, and stop after this many characters; without either limit the whole split is read and cached."""
    most_windows: int | None = None
    """Maximum number of evaluation windows."""

    @property
    def streamed(self) -> bool:
        return self.first_rows is not None or self.first_characters is not None


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the Hub with its parts for calibration and evaluation."""

    dataset: str
    config: str | None
    column: str | None
    calibration: Part
    evaluation: Part
    revision: str | None = None

    def read(self, part: Part, cache_dir: Path | None = None) -> JoinedText | Documents:
        """Read a part.

        Raises BadInput if the dataset is unreachable, unknown or gated, or has no such config, split or column.
        """
        splits = self._load(part, cache_dir)
        split = next((name for name in part.splits if name in splits), None)
        if split is None:
            raise BadInput(
                f"dataset {self.dataset!r} has no split {' or '.join(map(repr, part.splits))}, only "
                f"{', '.join(splits)}",
                fix=LOCAL_FILE_HINT,
            )
        source = " ".join(filter(None, (self.dataset, self.config, part.file, f"({split})")))
        try:
            texts = _texts(splits[split], self.column, part, source)
        except BadInput:
            raise
        except Exception as error:  # a stream can break in any layer: network, decompression, parsing
            raise _unreadable(self.dataset, error) from error
        if part.separator is None:
            return Documents(texts, source)
        return join(texts, part.separator, source, part.most_windows)

    def _load(self, part: Part, cache_dir: Path | None) -> Any:
        require_dataset(self.dataset, cache_dir, Set("dataset", "embedded") if part is self.calibration else None)
        options: dict[str, Any] = {
            "data_files": {part.splits[0]: part.file} if part.file else None,
            "revision": self.revision,
            "cache_dir": str(cache_dir) if cache_dir else None,
            "streaming": part.streamed,
        }
        try:
            return load_dataset(self.dataset, self.config, **options)
        except Exception as error:  # the library's own errors share no base class
            raise _unreadable(self.dataset, error) from error


def require_dataset(dataset: str, cache_dir: Path | None = None, instead: Set | None = None) -> None:
    """Check once, without retries, that a dataset is on the Hub; a copy in the cache is enough.

    instead: an alternative setting that needs no network.
    Raises BadInput if it does not exist, needs a login, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # Like datasets, whose import takes a second.
    cache = Path(cache_dir or datasets_cache() or Path(HF_HOME) / "datasets")
    if (cache / dataset.replace("/", "___")).is_dir():
        return
    try:
        HfApi().dataset_info(dataset, timeout=REACH_SECONDS)
    except GatedRepoError as error:
        raise BadInput(
            f"dataset {dataset!r} is gated",
            fix=f"accept its terms on the Hub and log in with `hf auth login`. {LOCAL_FILE_HINT}",
        ) from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"dataset {dataset!r} is not on the Hub, or is private", fix=LOCAL_FILE_HINT) from error
    except Exception as error:  # network errors of many types: DNS, routing, proxy, offline mode
        typed = (": ", instead) if instead is not None else ()
        raise BadInput(
            f"dataset {dataset!r} is out of reach: the Hugging Face Hub does not answer ({_one_line(error)})",
            fix=(f"{LOCAL_FILE_HINT}, or use the corpus 'embedded', which needs no network", *typed),
        ) from error


def _texts(rows: Any, wanted: str | None, part: Part, source: str) -> list[str]:
    if not part.streamed:
        return [text or "" for text in rows[choose_text_column(_columns(rows.features), wanted, source)]]
    taken = itertools.islice(rows, part.first_rows)
    first = next(taken, None)
    if first is None:
        return []
    # A stream may not know its columns before it is read.
    columns = _columns(rows.features) if rows.features else {name: isinstance(first[name], str) for name in first}
    column = choose_text_column(columns, wanted, source)
    return _up_to(itertools.chain([first], taken), column, part.first_characters)


def _columns(features: Mapping[str, Any]) -> dict[str, bool]:
    return {name: getattr(kind, "dtype", None) in ("string", "large_string") for name, kind in features.items()}


def _up_to(rows: Iterable[dict[str, Any]], column: str, characters: int | None) -> list[str]:
    texts: list[str] = []
    total = 0
    for row in rows:
        text = row[column] or ""
        texts.append(text)
        total += len(text)
        if characters is not None and total >= characters:
            break
    return texts


def _unreadable(dataset: str, error: Exception) -> BadInput:
    return BadInput(f"dataset {dataset!r} cannot be read ({_one_line(error)})", fix=LOCAL_FILE_HINT)


def _one_line(error: Exception, most_characters: int = 300) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most_characters else words[:most_characters] + "…"


def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
    """Call `datasets.load_dataset` with progress bars like our other downloads."""
    from datasets import utils  # slow to import, and only some data needs it
    from datasets.load import load_dataset
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    with bars_hidden(utils, are_progress_bars_disabled()):
        return load_dataset(path, name, **options)
