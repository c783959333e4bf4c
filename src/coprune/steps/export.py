"""Export of a model as a GGUF file, modelled on another GGUF file made from the same source."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

from torch import Tensor

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, CopruneError, UnsupportedModel
from coprune.base.files import require_usable, write_durably
from coprune.base.progress import Reporter
from coprune.base.validation import settings_of
from coprune.base.words import LeaveOut, Set, Sheet, Shown
from coprune.data.keyword_arguments import ExportArguments
from coprune.gguf_files.converter import convert, find_converter, no_template
from coprune.gguf_files.deci import deci_plans, same_in_llama_cpp
from coprune.gguf_files.export_settings import AUTO, NONE, ExportSettings
from coprune.gguf_files.file_plan import Example, planned, read_example
from coprune.gguf_files.importance import Asked, found_in, in_file, read_importance, write_importance
from coprune.gguf_files.llama_cpp import (
    BY_LLAMA_CPP,
    NEED_IMPORTANCE,
    PLAIN,
    GgufType,
    Quantisation,
    has_llama_cpp,
    quantize,
    require_type,
)
from coprune.gguf_files.metadata import Plan, write_gguf
from coprune.gguf_files.modelfile import FILE, Written, write_modelfile
from coprune.gguf_files.smaller import Exported, exported
from coprune.gguf_files.verify import require_same, require_written
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder, locate
from coprune.model.edits import history_of
from coprune.model.removed import Removal
from coprune.removal.silent_units import Narrow, narrowed
from coprune.report.run_folder import model_of
from coprune.steps.round_file import round_file
from coprune.steps.train_scales import train_scales


@dataclass(frozen=True, repr=False)
class Gguf(Shown):
    """A written GGUF file."""

    path: Path
    type: str
    bytes: int
    like: Path
    """The file that gave metadata and tensor order, or the folder from which llama.cpp's converter made one."""
    tensors: int
    removed: Sequence[Removal] = ()
    """Parts removed relative to the other file."""
    architecture: str = ""
    """Architecture name in llama.cpp: that of the other file, or `deci` if blocks differ in width."""

    modelfile: Written | None = None
    """Ollama's Modelfile beside it, if requested."""

    def headline(self) -> str:
        """Return the path, type and size of the file."""
        return f"{self.path}: {self.type}, {self.bytes:,} bytes"

    def sheet(self) -> Sheet:
        """Return the main figures and the source."""
        rows = [("tensors", f"{self.tensors} in {self.type}, {self.bytes:,} bytes"), ("like", str(self.like))]
        rows.append(("architecture", self.architecture))
        if self.modelfile is not None:
            rows.append(("modelfile", f"{self.modelfile.path}: {self.modelfile.content.line()}"))
        return Sheet(self.headline(), [*rows, *(("removed", one.line()) for one in self.removed)])


def export(
    model: Path | str,
    output: Path | str,
    *,
    type: GgufType = "f16",
    quiet: bool = False,
    **how: Unpack[ExportArguments],
) -> Gguf:
    """Write a model as a GGUF file, for llama.cpp and everything built on it.

    Args:
        model: a folder of a model (or of the run that saved it), or a GGUF file to convert to another type.
        output: the file to write.
        type: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0, or with llama.cpp's quantiser q6_k, q5_k_m, q4_k_m, iq3_xxs …
        quiet: no progress bars and lines.
        how: further settings; see `coprune export --help`.

    Returns:
        A summary of the written file.

    Raises:
        BadInput: a file is missing or already exists, the type is unknown or needs a package, or `like` belongs to another model.
        UnsupportedModel: the file's tensors or numbers cannot be identified, or transformers cannot read its architecture.
    """
    target, reporter = expand_home(output), Reporter(quiet)
    require_type(type)
    settings = settings_of(ExportSettings, how)
    weighing = _weighing(type, settings)
    _require_free(target)
    if settings.modelfile and (taken := target.with_name(FILE)).exists():
        raise BadInput(f"{taken} exists", field="modelfile", value=True, fix="remove it, or write into another folder")
    with reporter.libraries():
        location = locate(model_of(str(model)))
        file = _example(location, settings.like, settings.converter)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _template(file, location, settings.converter, target.parent, reporter) as (template, source):
        example = read_example(template, source, reporter)
        making = Making(
            example, Narrow(source, None) if settings.padded else _without_zeros(source, reporter), reporter
        )
        written: list[Whole] = []

        def write(final: Path) -> None:
            written.append(_write(making, type, final, partial(_beside, final), weighing))
            place, matrices = making.narrow.alike.location, written[-1].matrices
            if settings.compensate:
                round_file(final, place, settings.dataset, matrices, reporter)
            if settings.distill:
                train_scales(final, place, settings.dataset, settings.distill, matrices, reporter)

        write_durably(target, write)
    (whole,) = written
    beside = write_modelfile(target) if settings.modelfile else None
    removed = [one for edits in whole.source.edits for one in edits.removals()]
    origin = location.path if file is None else file.path
    figures = target.stat().st_size, origin, len(whole.plan.tensors), removed, whole.plan.arch
    return Gguf(target, type, *figures, beside)


@contextmanager
def _template(
    file: GgufFile | None, location: Location, converter: Path | str | None, beside: Path, reporter: Reporter
) -> Iterator[tuple[GgufFile, Exported]]:
    """Yield the GGUF template and the model, both derived from the same source.

    Args:
        file: the template; if None, the converter makes one from the source's folder or the model's own.
        location: the model.
        converter: as in `find_converter`.
        beside: a folder with room for a file as large as the source.
        reporter: reports the conversion.

    Raises:
        BadInput: there is no template and no converter, or the converter refuses the model.
    """
    source = exported(location)
    if file is not None:
        yield file, source
        return
    assert isinstance(location, ModelFolder)
    whole = source.source or location
    if whole.path == location.path:  # the model that it was cut from is missing, so this one is its own source
        source = replace(source, edits=[], source=location)
    with tempfile.TemporaryDirectory(prefix=".converted-", dir=beside) as folder:
        yield template_of(whole, Path(folder, "source.gguf"), converter, reporter), source


def template_of(folder: ModelFolder, target: Path, converter: Path | str | None, reporter: Reporter) -> GgufFile:
    """Convert a model's folder to a GGUF file that serves as the template for the model's exports. Raises BadInput."""
    script = find_converter(converter)
    if script is None:
        raise no_template(folder.path, folder.name)
    reporter.say(f"Converting {folder.name} with {script}, for its metadata and tokenizer")
    convert(script, folder, target, reporter)
    return GgufFile(target, folder.name)


def _without_zeros(source: Exported, reporter: Reporter) -> Narrow:
    try:
        return narrowed(source)
    except CopruneError as error:
        reporter.say(f"Zeros stay in the file: {error}")
        return Narrow(source, None)


def _weighing(kind: str, how: ExportSettings) -> Asked:
    """Return the requested importance matrix. Raises BadInput if it has no effect, or if a type needs one and has none."""
    named, save = how.imatrix or NONE, how.save_imatrix
    if how.compensate and kind in PLAIN:
        cause = f"nothing is rounded in the type {kind}, so compensate has no effect"
        raise BadInput(cause, field="compensate", value=True, fix=LeaveOut("compensate"))
    if how.distill and kind in PLAIN:
        cause = f"the type {kind} has no scales, so distill has no effect"
        raise BadInput(cause, field="distill", value=how.distill, fix=LeaveOut("distill"))
    if named != NONE and kind not in BY_LLAMA_CPP:
        cause = f"an importance matrix has no effect on the type {kind}"
        raise BadInput(cause, field="imatrix", value=named, fix=LeaveOut("imatrix"))
    if named == NONE and kind in NEED_IMPORTANCE:
        cause = f"the type {kind} needs an importance matrix"
        raise BadInput(cause, field="type", value=kind, fix=("add ", Set("imatrix", AUTO), ", or name a file of it"))
    if named == NONE and save is not None:
        fix = ("add ", Set("imatrix", AUTO))
        raise BadInput("there is no importance matrix to save", field="save_imatrix", value=str(save), fix=fix)
    target = None if save is None else expand_home(save)
    require_usable(target, "save_imatrix") if target is not None else None
    if named in (AUTO, NONE):
        return Asked(data=how.dataset if named == AUTO else None, save=target)
    read_importance(expand_home(named))
    return Asked(file=expand_home(named), save=target)


def _write(making: Making, kind: str, final: Path, beside: Beside, weighing: Asked) -> Whole:
    """Write a file of a type; through float16 if llama.cpp quantises it or has to tell which of two layouts is right."""
    exact = kind if kind in PLAIN or (making.narrow.apart is None and kind not in BY_LLAMA_CPP) else "f16"
    whole = making.chosen(exact, beside)
    if kind not in BY_LLAMA_CPP:
        whole = whole if kind == exact else making.again(whole, kind)
        whole.write(final, making.reporter)
        return whole
    if weighing.file is not None:
        _require_fitting(weighing.file, whole.plan)
    with beside() as halves:
        whole.write(halves, making.reporter)
        importance = weighing.find(making.narrow.alike.location, making.reporter)
        if importance is not None and weighing.file is None:
            names = {name: planned.source for name, planned in whole.plan.tensors.items()}
            importance = in_file(importance, names, making.example, whole.source)
        if importance is not None and weighing.save is not None:
            write_importance(weighing.save, importance)
        making.reporter.say(f"Quantising to {kind}")
        quantize(halves, final, Quantisation(kind, importance))
    return whole


def _require_fitting(file: Path, plan: Plan) -> None:
    """Raise BadInput if an importance matrix belongs to another model."""
    importance = read_importance(file)
    inputs = {name: plan.tensors[name].shape[-1] for name in importance.keys() & plan.tensors.keys()}
    if not inputs or any(importance[name].shape[-1] != count for name, count in inputs.items()):
        cause = f"{file} is the importance matrix of another model"
        raise BadInput(cause, field="imatrix", value=str(file), fix="name one of this model, or take auto")


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder."""
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


def _example(location: Location, like: Path | str | None, converter: Path | str | None) -> GgufFile | None:
    """Return the GGUF template: the named file or the model's source; None if one has to be made.

    Raises BadInput if none can be made.
    """
    if like is not None:
        if converter is not None:
            raise BadInput(
                "a GGUF file is named, so nothing is converted", field="converter", fix=LeaveOut("converter")
            )
        try:
            found = locate(like)
        except BadInput as error:
            raise BadInput(error.cause, field="like", value=str(like), fix=error.fix) from error
        if not isinstance(found, GgufFile):
            raise BadInput(f"{like} is not a GGUF file", field="like", value=like, fix="name the file itself")
        return found
    if isinstance(location, GgufFile):
        return location
    source, _ = history_of(location.path)
    if source is not None:
        try:
            found = locate(source)
        except BadInput:
            found = location  # deleted, or only on the Hub
        if isinstance(found, GgufFile):
            return found
    if find_converter(converter) is None:
        raise no_template(location.path, location.name)
    return None


Beside = Callable[[], AbstractContextManager[Path]]
"""Context manager that yields the path of a temporary file."""


@dataclass(frozen=True)
class Whole:
    """The content of a new file."""

    plan: Plan
    example: Example
    source: Exported
    number: int | None = None
    """Index of the layout with a width per block; None if all blocks are alike."""
    arrange: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    """Reorders a tensor, named as in the example, for the file's architecture."""

    def values(self, name: str) -> Tensor:
        """Return a tensor as float32, by its name in the example."""
        return self.arrange(name, self.example.values(name, self.source))

    def matrices(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the matrices, named as in the file, as they would be if the model had these values."""
        for name, tensor in self.plan.tensors.items():
            own = found_in(values, tensor.source, self.example, self.source)
            if own is not None:
                yield name, self.arrange(tensor.source, own)

    def write(self, file: Path, reporter: Reporter) -> None:
        """Write the file, reload it and compare. Raises VerificationError or UnsupportedModel if it differs from the model."""
        with reporter.bar("Writing", self.plan.bytes) as advance:
            write_gguf(file, self.plan, self.values, advance)
        reporter.say("Reloading the file to compare it")
        if self.number is not None:
            require_written(file, self.plan, self.values)
        elif (unread := require_same(file, self.source, self.plan.kind)) is not None:
            reporter.say(unread)


@dataclass(frozen=True)
class Making:
    """A model being exported."""

    example: Example
    narrow: Narrow
    reporter: Reporter

    def alike(self, kind: str) -> Whole:
        """Return the file in the template's architecture. kind: a type supported by the gguf package."""
        source = self.narrow.alike
        return Whole(planned(self.example, source, kind), self.example, source)

    def _apart(self, kind: str) -> Iterator[Whole]:
        source = self.narrow.apart
        assert source is not None
        for number, found in enumerate(deci_plans(self.alike(kind).plan, self.example, source)):
            yield Whole(found.plan, self.example, source, number, found.arrange)

    def again(self, whole: Whole, kind: str) -> Whole:
        """Return the same file in another type."""
        if whole.number is None:
            return self.alike(kind)
        return next(other for other in self._apart(kind) if other.number == whole.number)

    def chosen(self, kind: str, beside: Beside) -> Whole:
        """Return the file with every block at its own width if llama.cpp computes the same, else the padded one."""
        whole = self.alike(kind)
        if self.narrow.apart is None:
            return whole
        why = "llama.cpp, which would have to confirm the narrow file, is not installed (coprune[gguf])"
        if has_llama_cpp():
            try:
                found, why = self._tried(whole, beside), "llama.cpp computes other outputs for the narrow file"
            except UnsupportedModel as error:
                found, why = None, str(error)
            if found is not None:
                return found
        self.reporter.say(f"Blocks of different widths stay padded with zeros: {why}.")
        return whole

    def _tried(self, whole: Whole, beside: Beside) -> Whole | None:
        kind = whole.plan.kind
        assert kind in PLAIN
        with beside() as padded:
            whole.write(padded, self.reporter)
            for other in self._apart(kind):
                with beside() as file:
                    other.write(file, self.reporter)
                    if same_in_llama_cpp(padded, file):
                        return other
        return None
