"""Counts of tokens in texts, word-frequency lists and code; and the held-out texts."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from coprune.base.errors import BadInput, unknown_name
from coprune.base.progress import Reporter
from coprune.data.corpora import CORPORA, calibration_text, evaluation_corpus_for, evaluation_text
from coprune.data.in_memory import GivenTokens
from coprune.data.text import JoinedText
from coprune.recipe.vocabulary_cut import shares_of
from coprune.vocabulary.choose import Weights
from coprune.vocabulary.samples import ENDS, KEYWORDS, LANGUAGES, PUNCTUATION, QUOTES, SOURCES

CODE = "code"
PACKAGE = "wordfreq"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")
_PASSAGE = 2_000
"""Characters of a passage, the unit of measurement."""
_HELD_OUT = 8
"""One of this many passages of a text is held out."""
_CODE = {
    ("stdlib", ".py"): 5_000_000,
    ("torch", ".py"): 2_500_000,
    ("transformers", ".py"): 2_500_000,
    ("torch", ".h"): 800_000,
}
"""Characters of code to read from packages that are always installed, by file ending; at most `_OF_A_FILE` per file."""
_OF_A_FILE = 30_000
_BATCH = 20_000
_FILL = 1e-9
"""Weight of default sources, which decides among tokens that occur in no text."""
_FILLING = {"en": 20_000, CODE: 200}
"""Number of words and code passages for tie-breaking."""
_USUAL = {"text": 0.3, "en": 0.5, CODE: 0.2}
"""Default shares, measured on Gemma-3-270M."""
_FORMS = (" {word}", 0.7), (" {Word}", 0.18), ("{Word}", 0.08), ("{word}", 0.04)
"""Forms of a word in texts, with their shares."""
_COMMONEST, _LEAST_OF_COMMONEST = 200, 0.2
"""Number of common words that identify a language, and their minimum share of a text."""
_SIGNS_OF_CODE, _LEAST_OF_CODE = frozenset("{}[]()=;_<>"), 0.04
"""Characters that identify code (a tenth of code, a hundredth of prose), and their minimum share of a text."""
_SIGNS = 0.02
"""Share of the counts for punctuation next to words."""


@dataclass(frozen=True)
class Source:
    """A source of token counts, with its share."""

    name: str
    share: float
    pieces: Sequence[str]
    weights: Sequence[float] | None = None
    """Weights of the pieces; None to count them."""


@dataclass(frozen=True)
class Texts:
    """Texts to count tokens in, and held-out text to measure on."""

    sources: list[Source]
    held_out: list[str]
    """Held-out passages of the user's text, or of the evaluation part of the calibration corpus."""
    label: str
    """Name of the held-out text."""
    notes: list[str] = field(default_factory=list)
    languages: tuple[str, ...] = ()
    """Requested languages."""


def read_texts(asked: Sequence[str], usual: str, cache_dir: Path | None, reporter: Reporter) -> Texts:
    """Read the sources that decide which tokens to keep.

    Args:
        asked: files, folders and corpora, languages by their codes, and `code`, each with an optional share.
        usual: the calibration text, the default.
        cache_dir: cache of Hub corpora.
        reporter: told about unavailable sources.

    Returns:
        Sources whose shares add up to 1, and held-out passages.

    Raises:
        BadInput: a text is missing or empty, a language is unknown, or a package is missing.
    """
    shares = shares_of(asked)
    of_languages = {name: share for name, share in shares.items() if _is_language(name)}
    of_texts = {name: share for name, share in shares.items() if name not in of_languages}
    for language in of_languages:
        require_language(language)
    notes: list[str] = []
    by_default = not shares
    if by_default:
        of_texts, of_languages = {usual: _USUAL["text"]}, {name: _USUAL[name] for name in ("en", CODE)}
        if not has_words():
            del of_languages["en"]
            notes.append(
                "English words are counted in the calibration text only; pip install 'coprune[languages]' adds lists"
            )
    found, held = [], list[str]()
    for name, share in of_texts.items():
        counted, own = _split(name, cache_dir, "dataset" if by_default else "vocabulary_text")
        found.append(Source(name, share, counted))
        held += own
    if not of_texts:
        held = [LANGUAGES.get(name, "") if name != CODE else "\n".join(SOURCES.values()) for name in of_languages]
        held = [text for text in held if text]
    found += [language_source(name, share) for name, share in of_languages.items()]
    total = sum(source.share for source in found)
    sources = [Source(one.name, one.share / total, one.pieces, one.weights) for one in found]
    for note in notes:
        reporter.say(note)
    label = ", ".join(of_texts) if of_texts else "samples"
    return Texts(sources, held, label, notes, tuple(of_languages))


def _is_language(name: str) -> bool:
    """Return whether a name is a language or `code`, not a text (write ./en for a folder)."""
    if name == CODE or name in LANGUAGES:
        return True
    return _LANGUAGE.fullmatch(name) is not None and name not in CORPORA and not Path(name).exists()


def _split(name: str, cache_dir: Path | None, setting: str) -> tuple[list[str], list[str]]:
    """Split a text into counted and held-out passages."""
    try:
        read = calibration_text(name, cache_dir)
    except BadInput as error:
        raise BadInput(error.cause, field=setting, value=name, fix=error.fix) from error
    if isinstance(read, GivenTokens):
        fix = "give them as text"
        raise BadInput(
            "token ids cannot be counted, since only text can be tokenised again", field=setting, value=name, fix=fix
        )
    whole = [read.text] if isinstance(read, JoinedText) else read.texts
    pieces = [piece for text in whole for piece in passages(text)]
    if not any(piece.strip() for piece in pieces):
        raise BadInput(f"{name} holds no text", field=setting, value=name, fix="name another file")
    other = evaluation_corpus_for(name)
    if other is not None:  # a corpus with an evaluation part
        held = evaluation_text(other, cache_dir)
        if isinstance(held, JoinedText):
            return pieces, list(passages(held.text))
    held_out = [piece for piece in pieces if _digest(piece) % _HELD_OUT == 0]
    kept = [piece for piece in pieces if _digest(piece) % _HELD_OUT]
    if not kept or not held_out:  # too short to hold anything out
        return pieces, pieces
    return kept, held_out


def _digest(text: str) -> int:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[0]


def passages(text: str, size: int = _PASSAGE) -> Iterator[str]:
    """Cut a text into passages at line ends, or at spaces in long lines."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            cut = max(text.rfind("\n", start + size // 2, end), 0) or max(text.rfind(" ", start + size // 2, end), 0)
            end = cut or end
        yield text[start:end]
        start = end


def has_words() -> bool:
    """Return whether word-frequency lists are installed."""
    return importlib.util.find_spec(PACKAGE) is not None


@cache
def word_lists() -> Mapping[str, str]:
    """Return the languages with word-frequency lists. Raises BadInput if the package is missing."""
    if not has_words():
        missing = f"words of languages come from the package {PACKAGE}, which is not installed"
        raise BadInput(missing, field="vocabulary_text", fix="pip install 'coprune[languages]'")
    import wordfreq

    found: Mapping[str, str] = wordfreq.available_languages("best")
    return found


def require_language(name: str) -> None:
    """Raise BadInput for an unknown language."""
    if name != CODE and name not in word_lists():
        raise unknown_name("language", name, [*word_lists(), CODE], field="vocabulary_text")


def sources_of(text: str) -> list[str]:
    """Detect the sources of a text by name: the language whose common words are most frequent, and `code`."""
    signs, found = sum(letter in _SIGNS_OF_CODE for letter in text), list[str]()
    if has_words() and (words := Counter(re.findall(r"\w+", text.lower()))):
        import wordfreq

        of = {
            name: sum(words[word] for word in wordfreq.top_n_list(name, _COMMONEST, "small")) for name in word_lists()
        }
        best = max(of, key=of.__getitem__)
        found += [best] if of[best] > _LEAST_OF_COMMONEST * words.total() else []
    return [*found, CODE] if signs > _LEAST_OF_CODE * len(text) else found


def language_source(name: str, share: float, most: int | None = None) -> Source:
    """Return the words of a language in their written forms, weighted by frequency; or code.

    most: maximum number of words or code passages; None for all.
    """
    if name == CODE:
        return Source(CODE, share, code_texts()[:most])
    import wordfreq

    pieces, weights = [], []
    words = wordfreq.get_frequency_dict(name, wordlist="best")
    for word, frequency in islice(sorted(words.items(), key=lambda item: (-item[1], item[0])), most):
        for form, part in _FORMS:
            pieces.append(form.format(word=word, Word=word.capitalize()))
            weights.append(frequency * part)
    total = sum(weights)
    beside = [f" {sign}" for sign in PUNCTUATION.split()]
    beside += [end + quote for end in ENDS.split() for quote in QUOTES.split()]
    pieces += beside
    weights += [total * _SIGNS / len(beside)] * len(beside)
    return Source(name, share, pieces, weights)


def code_texts() -> list[str]:
    """Return code from Python's standard library and always installed packages, and keywords of other languages."""
    found = list(KEYWORDS.values())
    for (package, ending), most in _CODE.items():
        folder = Path(sysconfig.get_path("stdlib") if package == "stdlib" else _folder_of(package))
        files = [p for p in sorted(folder.rglob(f"*{ending}")) if "site-packages" not in p.relative_to(folder).parts]
        size = 0
        for path in sorted(files, key=lambda path: _digest(path.name)):  # a mix of all parts
            if size > most:
                break
            text = path.read_text(encoding="utf-8", errors="replace")[:_OF_A_FILE]
            size += len(text)
            found += passages(text)
    return found


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None, package
    assert found.origin is not None, package
    return Path(found.origin).parent


def count(tokenizer: Tokenizer, source: Source, rows: int, advance: Any = lambda amount: None) -> Weights:
    """Return each token's share of a source's tokens, `rows` float64 that add up to 1."""
    found = np.zeros(rows)
    for start in range(0, len(source.pieces), _BATCH):
        some = source.pieces[start : start + _BATCH]
        weights = [1.0] * len(some) if source.weights is None else source.weights[start : start + _BATCH]
        encoded = tokenizer.encode_batch_fast(list(some), add_special_tokens=False)
        for one, weight in zip(encoded, weights, strict=True):
            np.add.at(found, one.ids, weight)
        advance(len(some))
    shares: Weights = found / max(float(found.sum()), 1e-300)
    return shares


def weigh(tokenizer: Tokenizer, texts: Texts, rows: int, tokens: Mapping[int, str], reporter: Reporter) -> Weights:
    """Return the weight of every token: its share in each source, by the source's share.

    Tokens in no source are ranked by their frequency in English and code, then by the requested scripts.
    """
    total = sum(len(source.pieces) for source in texts.sources)
    weights = np.zeros(rows)
    with reporter.bar("Counting tokens", total) as advance:
        for source in texts.sources:
            weights += source.share * count(tokenizer, source, rows, advance)
    usual = [name for name in ("en", CODE) if name not in texts.languages and (name == CODE or has_words())]
    for name in usual:
        weights += _FILL * count(tokenizer, language_source(name, 1.0, _FILLING[name]), rows)
    used = {script for number in np.flatnonzero(weights > 1e-6) for script in scripts(tokens.get(int(number), ""))}
    near = [number for number, token in tokens.items() if number < rows and scripts(token) <= used]
    weights[near] += _FILL**2
    return weights


@cache
def _script(letter: str) -> str | None:
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else None


def scripts(token: str) -> set[str]:
    """Return the scripts of a token's letters, by the first word of their names."""
    return {script for letter in token if (script := _script(letter)) is not None}
