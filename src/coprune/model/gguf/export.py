"""Export a model as a GGUF file, after the example of another one that was made from the same source model."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coprune.base.durable import write_durably
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, CopruneError
from coprune.base.output_names import require_usable
from coprune.base.progress import Reporter
from coprune.base.shown import Sheet, Shown
from coprune.base.words import Setting
from coprune.model.checkpoint.locate import GgufFile, Location, locate
from coprune.model.edits import history_of
from coprune.model.gguf.llama_cpp import quantize
from coprune.model.gguf.making import Beside, Making, Whole
from coprune.model.gguf.narrow import Narrow, narrowed
from coprune.model.gguf.plan import read_example
from coprune.model.gguf.smaller import Exported, exported
from coprune.model.gguf.types import BY_LLAMA_CPP, PLAIN, require_type


@dataclass(frozen=True, repr=False)
class Gguf(Shown):
    """A GGUF file that was written."""

    path: Path
    type: str
    bytes: int
    like: Path
    """The file whose metadata and order it has."""
    tensors: int
    removed: Sequence[str] = ()
    """What is less in it than in that file, in words."""
    architecture: str = ""
    """As llama.cpp calls it: that file's, or `deci` where blocks differ in width."""

    def headline(self) -> str:
        """Where the file is, and its size."""
        return f"{self.path}: {self.type}, {self.bytes:,} bytes"

    def sheet(self) -> Sheet:
        """What it holds and where that came from."""
        rows = [("tensors", f"{self.tensors} in {self.type}, {self.bytes:,} bytes"), ("like", str(self.like))]
        rows.append(("architecture", self.architecture))
        return Sheet(self.headline(), [*rows, *(("removed", line) for line in self.removed)])


def export(
    model: Path | str,
    output: Path | str,
    *,
    like: Path | str | None = None,
    type: str = "f16",
    padded: bool = False,
    quiet: bool = False,
) -> Gguf:
    """Write a model as a GGUF file, which llama.cpp and all that builds on it can run.

    Args:
        model: a folder, such as one with a smaller model that `prune` saved, or a GGUF file to be stored in another type.
        output: the file to write.
        like: a GGUF file of the source model, in any type, whose metadata, tokenizer and order are taken over; by default the
            one that the model was made from.
        type: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0, or with llama.cpp's quantiser q6_k, q5_k_m, q4_k_m, q3_k_m …
        padded: keep channels and heads that are all zeros, with which some folders pad their blocks to one width.
        quiet: no progress bars and lines.

    Returns:
        What was written.

    Raises:
        BadInput: a file is missing or taken, the type is unknown or needs a package, or `like` is of another model.
        UnsupportedModel: the file's tensors or numbers cannot be told apart, or transformers cannot read its architecture.
    """
    target, reporter = expand_home(output), Reporter(quiet)
    require_type(type)
    _require_free(target)
    with reporter.libraries():
        location = locate(model)
        file = _example(location, like)
    source = exported(location)
    example = read_example(file, source, reporter)
    making = Making(example, Narrow(source, None) if padded else _without_zeros(source, reporter), reporter)
    written: list[Whole] = []

    def write(final: Path) -> None:
        written.append(_write(making, type, final, partial(_beside, final)))

    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, write)
    (whole,) = written
    removed = [line for edits in whole.source.edits for line in edits.lines()]
    return Gguf(target, type, target.stat().st_size, file.path, len(whole.plan.tensors), removed, whole.plan.arch)


def _without_zeros(source: Exported, reporter: Reporter) -> Narrow:
    try:
        return narrowed(source)
    except CopruneError as error:
        reporter.say(f"Zeros stay in the file: {error}")
        return Narrow(source, None)


def _write(making: Making, kind: str, final: Path, beside: Beside) -> Whole:
    """Write a file of a type, by way of float16 where llama.cpp quantises it or has to show which of two files is right."""
    exact = kind if kind in PLAIN or (making.narrow.apart is None and kind not in BY_LLAMA_CPP) else "f16"
    whole = making.chosen(exact, beside)
    if kind not in BY_LLAMA_CPP:
        whole = whole if kind == exact else making.again(whole, kind)
        whole.write(final, making.reporter)
        return whole
    with beside() as halves:
        whole.write(halves, making.reporter)
        making.reporter.say(f"Quantising to {kind}")
        quantize(halves, final, kind)
    return whole


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """A temporary file in the same folder."""
    path = final.with_name(f"{secrets.token_hex(4)}.{final.name}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _require_free(target: Path) -> None:
    require_usable(target, "output")
    if target.suffix.lower() != ".gguf":
        raise BadInput(
            f"{target} does not end with .gguf", field="output", value=target, fix=f"call it {target.name}.gguf"
        )
    if target.exists():
        raise BadInput(f"{target} exists", field="output", value=target, fix="remove it or choose another name")


def _example(location: Location, like: Path | str | None) -> GgufFile:
    """The GGUF file to do it like: the one that was named, or the one that the model was made from."""
    if like is not None:
        try:
            found = locate(like)
        except BadInput as error:
            raise BadInput(error.cause, field="like", value=str(like), fix=error.fix) from error
        if not isinstance(found, GgufFile):
            raise BadInput(f"{like} is no GGUF file", field="like", value=like, fix="name the file itself")
        return found
    if isinstance(location, GgufFile):
        return location
    source, _ = history_of(location.path)
    if source is not None:
        try:
            found = locate(source)
        except BadInput:
            found = location  # it has gone, or only the Hub has it
        if isinstance(found, GgufFile):
            return found
    raise BadInput(
        f"nothing says which GGUF file {location.name} was made from, and it needs one for its metadata and tokenizer",
        field="like",
        fix=(
            "name one with ",
            Setting("like"),
            ": any GGUF file of the same source model, in any type. The Hub has one of most models, in repositories whose names "
            "end with -GGUF; or llama.cpp's convert_hf_to_gguf.py makes one of the source model's folder",
        ),
    )
