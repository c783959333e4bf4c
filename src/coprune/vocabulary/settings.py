"""Token ids and names in the JSON files of a folder: configuration, generation settings, processors, tokenizer settings.

An integer is a token's id by its key (`eos_token_id`), by the token that its key names (`{"<|en|>": 50259}`), or because its key
ends in `_id` and it is the id of an added token. Any other that happens to be such an id is reported, unless its key is that of
a size, a count or a place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from fnmatch import fnmatchcase
from typing import Any

from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.checkpoint.companions import own_files
from coprune.model.checkpoint.digest import NOTES
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.checkpoint.shards import read_json
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.kinds import Vocabulary

_IDS = re.compile(
    r"(.*_)?token_ids?|.*_token_ind(ex|ices)|(begin_)?suppress_tokens|(bad|force)_words_ids|forced_decoder_ids|sequence_bias"
    r"|.*_to_ids?"
)
"""Keys whose values are ids of tokens."""
_PAIRS = ("forced_decoder_ids",)
"""Keys of lists of (position, token) pairs, of which only the second are ids."""
_BIASES = ("sequence_bias",)
"""Keys of lists of (sequence, number) pairs, of which only the sequences are ids."""
_PERHAPS = re.compile(r".*_ids?")
_OTHERWISE = re.compile(
    r"(num|n|max|min|mean|total|top|first|last)_.*"
    r"|(.*_)?(size|dim|length|len|layer|head|hidden|count|rank|step|factor|ratio|rate|window|token|bin|bit|group|block|channel"
    r"|stride|kernel|freq|theta|scale|scaling|scalar|cap|width|height|depth|pattern|interval|index|indice|idx|version|dimension"
    r"|expert|stage|level|point|position|frequency|range|feature|state|resolution|offset|padding|expand|mult|section|seed|beam"
    r"|type_id|distance|bucket|section|input|query|queries|chunk|sample|frame|patch|patches|image|second|class|classe)s?(_.*)?"
    r"|\w\w?|\d+"
)
"""Keys of sizes, counts and places."""
_LABELS = re.compile(r"(.*\.)?\w+2(id|label)\.[^.]*")
"""Places of numbers of labels."""
_NAMES = re.compile(r".*_token|.*_special_tokens")
_SIZE = re.compile(r".*vocab.*")


_LISTED = 20
"""Maximum number of places named in a message."""
MAP_FILE = "coprune_vocabulary.json"
"""File with the old ids by new id, for drafts, adapters and tokenised data that use old ids."""
TOKENIZER_FILE = "tokenizer.json"
STALE = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.spm")
"""Files that duplicate the old vocabulary."""
_NOT_SETTINGS = (TOKENIZER_FILE, EDITS_FILE, MAP_FILE, *NOTES, "*.index.json", *STALE)
"""JSON files without token ids, or that are rewritten anyway."""
_DOUBTED = ("config.json", "generation_config.json", "tokenizer_config.json", "*processor_config.json")
"""Files used for loading a model, in which integers that may be ids are reported."""
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
"""Files whose token names are added to a tokenizer that lacks them."""


class _Role(Enum):
    """Meaning of an integer."""

    ID = auto()
    UNKNOWN = auto()


_Visit = Callable[[str, int, _Role], int]
"""From the path of an integer, its value and its role to its new value."""


@dataclass(frozen=True)
class Naming:
    """The rules for recognising token ids among integers: by tokens and vocabulary sizes."""

    rows: int
    """Ids from here on have no row in the embedding."""
    vocabulary: Vocabulary | None = None
    """None: only keys decide."""
    sizes: Collection[int] = field(default=())
    """Sizes of the vocabulary that the configuration gives, besides the rows."""

    def ids(self, content: Mapping[str, Any]) -> set[int]:
        """Return all ids with a row in the embedding that a file's content names, by their numbers or by the tokens."""
        found: set[int] = set()

        def note(_: str, number: int, role: _Role) -> int:
            found.update([number] if role is _Role.ID else ())
            return number

        self._walk(content, note)
        if self.vocabulary is not None:
            found |= {self.vocabulary.by_token[name] for name in _names(content) if name in self.vocabulary.by_token}
        return {number for number in found if number < self.rows}

    def cut(self, content: Mapping[str, Any], kept: Kept, instead: int | None = None) -> dict[str, Any]:
        """Return a file's content with new ids.

        Args:
            content: of the file.
            kept: the kept tokens.
            instead: the id that replaces removed ones; None for an error.

        Raises:
            UnsupportedModel: it names a removed token.
        """

        def moved(place: str, number: int, role: _Role) -> int:
            if role is not _Role.ID:
                return number
            if number not in kept.new:
                if instead is not None:
                    return instead
                raise UnsupportedModel(f"{place} names the token {number}, which is not kept")
            return kept.new[number]

        return self._walk(content, moved)

    def doubtful(self, content: Mapping[str, Any], kept: Kept) -> list[str]:
        """Return the places of integers that might be token ids and would then have to change."""
        found: list[str] = []

        def note(place: str, number: int, role: _Role) -> int:
            if role is _Role.UNKNOWN and kept.new.get(number) != number:
                found.append(f"{place} = {number}")
            return number

        self._walk(content, note)
        return found

    def without_rows(self, content: Mapping[str, Any], kept: Kept) -> set[str]:
        """Return the tokens in a tokenizer's settings for which the smaller model has no row."""
        assert self.vocabulary is not None
        ids = self.vocabulary.by_token
        return {name for name in _names(content) if ids.get(name) not in kept.new}

    def _walk(self, content: Mapping[str, Any], visit: _Visit, above: str = "") -> dict[str, Any]:
        size = content.get("vocab_size")
        if above and type(size) is int and size != self.rows and size not in self.sizes:
            return dict(content)  # a submodel with its own vocabulary, for example of audio
        return {key: self._value(content, key, value, visit, f"{above}{key}") for key, value in content.items()}

    def _value(self, beside: Mapping[str, Any], key: str, value: Any, visit: _Visit, place: str) -> Any:
        if _IDS.fullmatch(key):
            return _ids(key, value, lambda number: self._visited(visit, place, number, _Role.ID))
        if isinstance(value, Mapping):
            return self._walk(value, visit, f"{place}.")
        if isinstance(value, list):
            return [self._value(beside, key, one, visit, f"{place}[{index}]") for index, one in enumerate(value)]
        if type(value) is int and (role := self._role(beside, key, value, place)) is not None:
            return self._visited(visit, place, value, role)
        return value

    def _visited(self, visit: _Visit, place: str, number: int, role: _Role) -> int:
        return visit(place, number, role) if 0 <= number < self.rows else number

    def _role(self, beside: Mapping[str, Any], key: str, number: int, place: str) -> _Role | None:
        """Return the role of an integer from its siblings; None if it is not an id."""
        if self.vocabulary is None or (token := self.vocabulary.tokens.get(number)) is None:
            return None
        if token == key or token.strip("<|>[]") == key or (key == "id" and token in beside.values()):
            return _Role.ID
        if number not in self.vocabulary.meaningful or _OTHERWISE.fullmatch(key) or _LABELS.fullmatch(place):
            return None
        return _Role.ID if _PERHAPS.fullmatch(key) else _Role.UNKNOWN


def _ids(key: str, value: Any, change: Callable[[int], int]) -> Any:
    if type(value) is int:
        return change(value)
    if isinstance(value, Mapping):
        return {name: _ids(key, one, change) for name, one in value.items()}
    if not isinstance(value, list):
        return value
    if key in _PAIRS and len(value) == 2 and all(type(one) in (int, type(None)) for one in value):
        return [value[0], None if value[1] is None else change(value[1])]
    if key in _BIASES and len(value) == 2 and isinstance(value[0], list) and isinstance(value[1], int | float):
        return [_ids(key, value[0], change), value[1]]
    return [_ids(key, one, change) for one in value]


def _names(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tokens that settings name: as text, as a mapping with the text in it, in lists or by further names."""
    for key, value in content.items():
        if _NAMES.fullmatch(key):
            yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and isinstance(value.get("content"), str):
        yield value["content"]
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def without_names(content: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """Return a tokenizer's settings without some of the tokens that they name: null, since what is absent has a default."""
    return {key: _without(value, gone) if _NAMES.fullmatch(key) else value for key, value in content.items()}


def _without(value: Any, gone: Collection[str]) -> Any:
    if isinstance(value, list):
        return [one for one in value if _without(one, gone) is not None]
    if isinstance(value, Mapping) and "content" not in value:
        return {name: one for name, one in value.items() if _without(one, gone) is not None}
    return None if next(_texts(value), None) in gone else value


def resized(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    """Return a configuration with new sizes of its vocabularies, at every level. sizes: new sizes by old."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = resized(value, sizes)
        else:
            named = _SIZE.fullmatch(key) and type(value) is int and value in sizes
            found[key] = sizes[value] if named else value
    return found


def sizes_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every vocabulary size in a configuration, with its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from sizes_in(value)
        elif _SIZE.fullmatch(key) and type(value) is int:
            yield key, value


def cut_added_tokens(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json` with added tokens under their new ids."""
    found = dict(config)
    if isinstance(tokens := found.get("added_tokens_decoder"), Mapping):
        found["added_tokens_decoder"] = {
            str(kept.new[int(number)]): token for number, token in tokens.items() if int(number) in kept.new
        }
    return found


def sizes_of(config: Mapping[str, Any], rows: int) -> set[int]:
    """Return the sizes of a configuration's vocabularies: of the embedding, and of tables of every layer."""
    return {rows} | {size for key, size in sizes_in(config) if key == "vocab_size_per_layer_input" and size < rows}


@dataclass(frozen=True)
class Settings:
    """The JSON files of a folder that may name tokens."""

    files: Mapping[str, Mapping[str, Any]]
    """Contents by name."""
    naming: Naming
    beyond: Mapping[str, str]
    """Special tokens by their names as attributes, which the tokenizer has and the model has no row for."""

    @classmethod
    def of(cls, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, rows: int) -> Settings:
        """Read the files.

        Args:
            folder: the model's folder.
            tokenizer: as transformers loads it, with what its class adds.
            vocabulary: of its `tokenizer.json`.
            rows: of the embedding.

        Raises:
            BadInput: a file used for loading the model is malformed.
        """
        files: dict[str, Mapping[str, Any]] = {}
        for path in own_files(folder.path):
            if path.suffix == ".json" and not matches(path.name, _NOT_SETTINGS):
                with nullcontext() if matches(path.name, (*_DOUBTED, *_TOKENIZER)) else suppress(BadInput):
                    files[path.name] = read_json(path)
        ids, named = tokenizer.get_vocab(), tokenizer.special_tokens_map.items()
        beyond = {name: token for name, token in named if isinstance(token, str) and ids.get(token, rows) >= rows}
        return cls(files, Naming(rows, vocabulary, sizes_of(files["config.json"], rows)), beyond)

    @property
    def named(self) -> set[int]:
        """Ids of tokens in the files."""
        return set().union(*(self.naming.ids(content) for content in self.files.values()))

    def cut(self, kept: Kept) -> dict[str, dict[str, Any]]:
        """Return the changed files by name. Raises UnsupportedModel if one names a removed token."""
        found = {name: self.naming.cut(content, kept) for name, content in self.files.items()}
        gone = self._gone(kept)
        for name in _TOKENIZER:
            if name in found:
                found[name] = without_names(cut_added_tokens(found[name], kept), gone)
        if self.beyond:
            found[_TOKENIZER[0]] = found.get(_TOKENIZER[0], {}) | dict.fromkeys(self.beyond)
        return {name: content for name, content in found.items() if content != self.files.get(name)}

    def notes(self, kept: Kept) -> list[str]:
        """Return notes on numbers that may be ids but are left unchanged, and on removed names."""
        doubtful = [
            f"{name}: {place}"
            for name, content in self.files.items()
            if matches(name, _DOUBTED)
            for place in self.naming.doubtful(content, kept)
        ]
        gone = sorted(self._gone(kept))
        return [
            f"{said}: {', '.join(which[:_LISTED])}{' …' if len(which) > _LISTED else ''}"
            for said, which in (
                ("left as they are, though they may be ids of tokens", doubtful),
                ("named by the tokenizer's settings, but without a row in the embedding, so left out there", gone),
            )
            if which
        ]

    def _gone(self, kept: Kept) -> set[str]:
        named = (self.naming.without_rows(self.files[name], kept) for name in _TOKENIZER if name in self.files)
        return {*self.beyond.values()}.union(*named)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
