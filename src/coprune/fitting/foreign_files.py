"""Foreign GGUF files of the same model, which a fit measures in addition to its own quants.

Torch is imported only when files are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import like_named
from coprune.fitting.candidates import DENSE, FOREIGN, Candidate
from coprune.model.checkpoint.gguf_header import gguf_parts
from coprune.model.checkpoint.glance import look_at_file

_FIELD = "candidate"
_MODEL, _SPLIT, _MERGES, _KINDS = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "merges", "token_type"))
_UNUSED = 5
"""Kind of a padding token, whose name differs between files."""


def look_at_candidates(names: Iterable[str]) -> None:
    """Raise BadInput for a file that does not exist, is not GGUF, or is one of several parts."""
    for name in names:
        path = expand_home(name)
        with _naming(name):
            if not path.is_file():
                near = like_named(path)
                fix = f"did you mean {near}?" if near else "name a GGUF file of the model"
                raise BadInput(f"there is no file {name}", fix=fix)
            if (parts := len(gguf_parts(path))) > 1:
                fix = "join them first with llama-gguf-split --merge"
                raise BadInput(f"{name} is one of {parts} parts, and a candidate is one file", fix=fix)
            look_at_file(path)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Report an error about a file as one of the setting that names it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(error.cause, field=_FIELD, value=str(path), fix=error.fix) from error


def candidates_in(names: Sequence[str]) -> dict[Candidate, Path]:
    """Return files as candidates, identified by their contents, with their paths. Raises BadInput for damaged files."""
    from coprune.model.checkpoint.digest import source_digest
    from coprune.model.checkpoint.locate import locate

    look_at_candidates(names)
    paths, found = [expand_home(name) for name in names], dict[Candidate, Path]()
    often = Counter(path.name for path in paths)
    for path in paths:
        title = path.name if often[path.name] == 1 else f"{path.absolute().parent.name}/{path.name}"
        with _naming(path):
            digest = source_digest(locate(path))
        found.setdefault(Candidate(DENSE, FOREIGN, file=digest, title=title), path)
    return found


def require_same_model(paths: Iterable[Path], model: Path, texts: Sequence[str]) -> None:
    """Raise BadInput if a file has another architecture or tokenizer than the model.

    Args:
        paths: the files.
        model: a GGUF file of the model.
        texts: texts on which the tokenizers are compared.
    """
    own = _Identity(model)
    for path in paths:
        with _naming(path):
            own.require_same(_Identity(path), texts)


class _Identity:
    """Architecture and tokenizer of a file, by which files of one model are recognised."""

    def __init__(self, path: Path) -> None:
        from coprune.gguf_files.metadata import architecture, read_fields
        from coprune.gguf_files.vocabulary_metadata import tokens_in
        from coprune.model.checkpoint.gguf_reader import gguf_reader

        reader = gguf_reader(path, field=_FIELD)
        fields = read_fields(reader)
        self.path, self.architecture = path, architecture(reader)
        self.values: dict[str, Any] = {key: field.value for key, field in fields.items()}
        kinds = self.values.get(_KINDS) or []
        tokens = tokens_in(fields)
        unused = {number for number, kind in enumerate(kinds) if kind == _UNUSED}
        self.tokens = [None if number in unused else token for number, token in enumerate(tokens)]

    def require_same(self, other: _Identity, texts: Sequence[str]) -> None:
        """Raise BadInput if another file is not of this model."""
        fix = "name a file that was made from the same model"
        if other.architecture != self.architecture:
            cause = f"{other.path} is a {other.architecture}, and the model a {self.architecture}"
            raise BadInput(cause, fix=fix)
        if len(other.tokens) != len(self.tokens):
            cause = f"{other.path} has {len(other.tokens):,} tokens, and the model {len(self.tokens):,}"
            raise BadInput(cause, fix=fix)
        for number, (one, own) in enumerate(zip(other.tokens, self.tokens, strict=True)):
            if one != own and None not in (one, own):
                cause = f"{other.path} has another vocabulary: token {number} is {one!r}, and the model's {own!r}"
                raise BadInput(cause, fix=fix)
        for key in (_MODEL, _MERGES):
            if other.values.get(key) != self.values.get(key):
                raise BadInput(f"{other.path} has another tokenizer: {key} differs from the model's", fix=fix)
        if other.tokenized(texts) != self.tokenized(texts):
            ways = " and ".join(str(one.values.get(_SPLIT)) for one in (other, self))
            raise BadInput(f"{other.path} splits text into other tokens than the model ({_SPLIT}: {ways})", fix=fix)

    def tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts with the file's own tokenizer. Raises BadInput if llama.cpp cannot load the file."""
        from coprune.gguf_files.llama_cpp import LlamaCpp

        with closing(LlamaCpp(self.path)) as engine:
            return [engine.tokenize(text) for text in texts]
