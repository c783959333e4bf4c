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
from coprune.recipe.vocabulary import shares_of
from coprune.vocabulary.choose import Weights
from coprune.vocabulary.samples import ENDS, KEYWORDS, LANGUAGES, PUNCTUATION, QUOTES, SOURCES

CODE = "code"
PACKAGE = "wordfreq"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")
_PASSAGE = 2_000
"""Characters of a passage, which is measured as one text."""
_HELD_OUT = 8
"""One of this many passages of a text is held out."""
_CODE = {
    ("stdlib", ".py"): 5_000_000,
    ("torch", ".py"): 2_500_000,
    ("transformers", ".py"): 2_500_000,
    ("torch", ".h"): 800_000,
}
"""Characters of code in packages that are always there, by endings of files; of a file at most `_OF_A_FILE`."""
_OF_A_FILE = 30_000
_BATCH = 20_000
_FILL = 1e-9
"""Weight of what nobody asked for, which decides among tokens that no text has."""
_FILLING = {"en": 20_000, CODE: 200}
"""Words and passages of code that decide where nothing else does."""
_USUAL = {"text": 0.3, "en": 0.5, CODE: 0.2}
"""Shares where nothing is said: measured on Gemma-3-270M."""
_FORMS = (" {word}", 0.7), (" {Word}", 0.18), ("{Word}", 0.08), ("{word}", 0.04)
"""Forms of a word in texts, with their shares."""
_COMMONEST, _LEAST_OF_COMMONEST = 200, 0.2
"""Words that tell a language, and the share of a text that they are at least."""
_SIGNS_OF_CODE, _LEAST_OF_CODE = frozenset("{}[]()=;_<>"), 0.04
"""Signs that tell code (a tenth of this project's, a hundredth of prose), and the share of a text that they are at least."""
_SIGNS = 0.02
"""Share of all counts for signs beside words."""


@dataclass(frozen=True)
class Source:
    """Something whose tokens count, with its share of all."""

    name: str
    share: float
    pieces: Sequence[str]
    weights: Sequence[float] | None = None
    """Weights of the pieces; None for their counts."""


@dataclass(frozen=True)
class Texts:
    """Texts to count tokens in, and text held out to measure on."""

    sources: list[Source]
    held_out: list[str]
    """Passages of the user's text, or of the calibration corpus' other part."""
    label: str
    """Name of the held-out text."""
    notes: list[str] = field(default_factory=list)
    languages: tuple[str, ...] = ()
    """Requested languages."""


def read_texts(asked: Sequence[str], usual: str, cache_dir: Path | None, reporter: Reporter) -> Texts:
    """Read what decides which tokens stay.

    Args:
        asked: files, folders and corpora, languages by their codes, and `code`, each perhaps with a share.
        usual: the calibration text, which counts where nothing is named.
        cache_dir: where corpora of the Hub are kept.
        reporter: who is told of what could not be had.

    Returns:
        Sources whose shares add up to 1, and passages that none of them has.

    Raises:
        BadInput: a text is missing or empty, a language is unknown, or a package is missing.
    """
    shares = shares_of(asked, "vocabulary_text")
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
                "English words count by the calibration text alone: pip install 'coprune[languages]' adds lists"
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
    """Return whether a name is that of a language, or `code`, rather than of a text (write ./en for a folder)."""
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
    if other is not None:  # a corpus whose other part is for measuring
        held = evaluation_text(other, cache_dir)
        if isinstance(held, JoinedText):
            return pieces, list(passages(held.text))
    held_out = [piece for piece in pieces if _digest(piece) % _HELD_OUT == 0]
    kept = [piece for piece in pieces if _digest(piece) % _HELD_OUT]
    if not kept or not held_out:  # so short that it is measured on what it is counted on
        return pieces, pieces
    return kept, held_out


def _digest(text: str) -> int:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[0]


def passages(text: str, size: int = _PASSAGE) -> Iterator[str]:
    """Cut a text into passages at the ends of lines, or at blanks where lines are long."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            cut = max(text.rfind("\n", start + size // 2, end), 0) or max(text.rfind(" ", start + size // 2, end), 0)
            end = cut or end
        yield text[start:end]
        start = end


def has_words() -> bool:
    """Return whether lists of word frequencies are installed."""
    return importlib.util.find_spec(PACKAGE) is not None


@cache
def word_lists() -> Mapping[str, str]:
    """Return the languages that there are lists of. Raises BadInput where the package is missing."""
    if not has_words():
        missing = f"words of languages come from the package {PACKAGE}, which is not installed"
        raise BadInput(missing, field="vocabulary_text", fix="pip install 'coprune[languages]'")
    import wordfreq

    found: Mapping[str, str] = wordfreq.available_languages("best")
    return found


def require_language(name: str) -> None:
    """Raise BadInput for a language that nobody knows."""
    if name != CODE and name not in word_lists():
        raise unknown_name("language", name, [*word_lists(), CODE], field="vocabulary_text")


def sources_of(text: str) -> list[str]:
    """Return what a text is made of, as names of sources: the language whose commonest words it has most, and `code`."""
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
    """Return words of a language as they stand in texts, each as often as it is used; or code.

    most: words, or passages of code, the most frequent or first; None for all.
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
    """Return code of Python's own library and of packages that are always there, and words of other languages."""
    found = list(KEYWORDS.values())
    for (package, ending), most in _CODE.items():
        folder = Path(sysconfig.get_path("stdlib") if package == "stdlib" else _folder_of(package))
        files = [p for p in sorted(folder.rglob(f"*{ending}")) if "site-packages" not in p.relative_to(folder).parts]
        size = 0
        for path in sorted(files, key=lambda path: _digest(path.name)):  # some of every part
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
    """Count the tokens of a source: a share of 1 over all tokens."""
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

    Tokens that no source has follow by how likely English and code have them, then by the scripts of what was asked for.
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
