"""The parts of a recipe about the input: which model is pruned, how, and on which calibration data.

A field's description is the help text of its command-line option, and its annotation says what it decides. Users know a
field by its name with the part's prefix, unless a `Word` says otherwise. Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.validation import is_text, one_is_enough
from coprune.base.words import Command, Words
from coprune.recipe.choice import USUAL_METHOD, Choice
from coprune.recipe.pattern import parse_pattern
from coprune.recipe.sources import split_sources, text_of


class Decides(Flag):
    """The results that a setting influences, combined with `|`."""

    WHERE = 0
    """Only sources, destinations and notifications."""
    RESULT = auto()
    """The weights, and what is recorded while they are pruned or trained."""
    ROUNDING = auto()
    """The last bits of the result, through the order of summation."""
    MEASUREMENT = auto()
    """The measurements of the result."""
    COST = auto()
    """Memory and time."""
    WHETHER = auto()
    """Only whether it is given counts, not its value."""
    WHOLE = RESULT | ROUNDING | MEASUREMENT
    """The result to the last bit, and its measurements."""


class Shown(Enum):
    """Visibility of a setting in `--help`."""

    COMMON = auto()
    """In the short help; all others only in `--help-all`."""


@dataclass(frozen=True)
class Word:
    """The name by which users know a field, if it differs."""

    name: str


def is_common(field: FieldInfo) -> bool:
    """Return whether a field is marked as common."""
    return Shown.COMMON in field.metadata


def decided_by(field: FieldInfo) -> Decides:
    """Return the results that a field influences, from its annotation. Raises TypeError if it has none."""
    for note in field.metadata:
        if isinstance(note, Decides):
            return note
    raise TypeError("a setting does not say what it decides; annotate it with Decides.")


def deciding(values: Mapping[str, Any], fields: Mapping[str, FieldInfo], what: Decides) -> dict[str, Any]:
    """Return the settings that influence some results.

    Args:
        values: settings by name.
        fields: their fields, under the same names.
        what: the results; influencing any of them is enough.
    """
    found = {}
    for name, field in fields.items():
        decides = decided_by(field)
        if decides & what:
            given = "not given" if values[name] is None else "given"
            found[name] = given if Decides.WHETHER in decides else values[name]
    return found


_RESULT = Decides.RESULT | Decides.COST


Globs = Annotated[tuple[str, ...], BeforeValidator(one_is_enough)]


class Part(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    title: ClassVar[str]
    """Title of the group of its options."""
    prefix: ClassVar[str] = ""
    """Prefix of its fields' names."""
    head: ClassVar[str | None] = None
    """The field that asks for the step that the others configure; its text may hold them too, as in `6:tokens=6144`."""

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and not is_text(str(text)):
                raise ValueError("it is not UTF-8, the encoding of recipes and reports")
        # Recipe files and Python calls bypass the shell that would expand `~`.
        return expand_home(value) if isinstance(value, Path) else value

    def first_changed(self) -> tuple[str, ...] | None:
        """Return the path of the first field that differs from its default, or None."""
        unsaid = type(self)()
        name, value = next(((name, value) for name, value in self if value != getattr(unsaid, name)), (None, None))
        if name is None:
            return None
        return (name, *(value.first_changed() or ())) if isinstance(value, Part) else (name,)


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DtypeOfModel = Annotated[
    DtypeName,
    _RESULT,
    Field(description="Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."),
]
Device = Annotated[
    str, _RESULT, Shown.COMMON, Field(description="auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")
]
CacheFolder = Annotated[Path | None, Decides.WHERE, Field(description="Folder for downloads. [the Hugging Face cache]")]


class ModelPart(Part):
    """Settings of the model."""

    title = "The model"

    name: Annotated[
        str,
        Word("model"),
        _RESULT,
        Shown.COMMON,
        Field(description="Hub id, local folder, GGUF file, or smollm2-135m.", min_length=1),
    ]
    dtype: DtypeOfModel = "auto"
    device: Device = "auto"
    cache_dir: CacheFolder = None
    # Streaming limits what can be measured; the weights are the same.
    stream: Annotated[
        bool | None,
        Decides.MEASUREMENT | Decides.COST,
        Field(
            description="Read and write the model block by block, so that only one block is in memory at a time. [yes for "
            "checkpoint folders; a GGUF file is read whole]"
        ),
    ] = None
    check_memory: Annotated[bool, Decides.WHERE, Field(description="Refuse a run that would not fit in memory.")] = True


def _per_cent(value: Any) -> Any:
    """Parse `50%` as 0.5 and return anything else unchanged."""
    said = value.strip() if isinstance(value, str) else ""
    try:
        return float(said.removesuffix("%")) / 100 if said.endswith("%") else value
    except ValueError:
        return value


class ReconstructPart(Part):
    """Settings of reconstruction: training each pruned block."""

    title = "What is pruned, and how"
    prefix = "reconstruct_"
    head = "steps"

    steps: Annotated[
        int,
        Word("reconstruct"),
        _RESULT,
        Field(description="Number of steps to train each pruned block toward the dense model's outputs.", ge=0),
    ] = 0
    tokens: Annotated[
        int,
        _RESULT,
        Field(
            description="With reconstruct: minimum number of tokens to train each block on; short samples get more steps, so "
            "that halving their length does not halve the training. [as many as the steps hold]",
            ge=0,
        ),
    ] = 0
    learning_rate: Annotated[
        float | None,
        Word("reconstruct_lr"),
        _RESULT,
        Field(
            description="Learning rate of reconstruct, times the size (root mean square) of each matrix and vector, so that one "
            "rate serves models with smaller or larger weights. [the best by held-out error of the first blocks]",
            gt=0,
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        _RESULT,
        Field(description="Compute type while blocks are trained."),
    ] = "float32"


class PrunePart(Part):
    """Settings of pruning: method, pattern, refinements."""

    title = "What is pruned, and how"

    method: Annotated[
        Choice, _RESULT, Shown.COMMON, Field(description="Pruning method; coprune methods lists them.")
    ] = USUAL_METHOD
    pattern: Annotated[
        str,
        Decides.RESULT,
        Shown.COMMON,
        Field(description="unstructured, or N:M = N kept of every M inputs (2:4, 4:8, 1:4 …)."),
    ] = "unstructured"
    sparsity: Annotated[
        float | None,
        Decides.RESULT,
        Shown.COMMON,
        Field(
            description="Fraction of zeros, 0 ≤ s < 1, or 50%; an N:M pattern sets it. [0.5]",
            allow_inf_nan=True,
        ),
        BeforeValidator(_per_cent, json_schema_input_type=float | str | None),
    ] = None
    permute: Annotated[
        bool,
        _RESULT,
        Field(
            description="For N:M: permute channels first so that pruning loses less; the model's outputs stay the same. Loads "
            "the whole model into memory."
        ),
    ] = False
    rotate: Annotated[
        bool,
        _RESULT,
        Field(
            description="Rotate the values of attention heads first so that pruning loses less; the model's outputs stay the "
            "same. Loads the whole model into memory."
        ),
    ] = False
    include: Annotated[
        Globs,
        _RESULT,
        Field(description="Prune only matrices that match this pattern, e.g. '*.q_proj'; repeatable."),
    ] = ()
    exclude: Annotated[
        Globs, _RESULT, Shown.COMMON, Field(description="Do not prune matrices that match this pattern; repeatable.")
    ] = ()
    allocation: Annotated[
        Choice,
        _RESULT,
        Field(
            description="How the sparsity is allocated to the matrices: uniform, owl or fisher (options as in "
            "owl:spread=0.1), or a FILE.yaml of name patterns and sparsities; how removed channels and heads are "
            "allocated to the blocks: uniform or error."
        ),
    ] = Choice(name="uniform")
    refine: Annotated[
        tuple[Choice, ...],
        BeforeValidator(one_is_enough),
        _RESULT,
        Field(
            description="Improve the weights left by each mask: refit, swaps (which ends with a refit), options as in "
            "refit:rounds=10; repeatable."
        ),
    ] = ()
    reconstruct: ReconstructPart = ReconstructPart()

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        """Refuse an unquoted 2:4, which YAML parses as two minutes and four seconds."""
        if isinstance(value, int) and not isinstance(value, bool):
            minutes, seconds = divmod(value, 60)
            raise ValueError(f'YAML parses N:M without quotes as a time; write pattern: "{minutes}:{seconds}"')
        return value

    @property
    def reshapes(self) -> bool:
        """Whether weights are permuted or rotated before pruning."""
        return self.permute or self.rotate

    @property
    def asks_for_zeros(self) -> bool:
        """Whether the user asked for zeros explicitly."""
        return self.sparsity is not None or self.pattern != "unstructured"

    @property
    def ratio(self) -> float:
        """The requested fraction of zeros."""
        return parse_pattern(self.pattern).ratio(self.sparsity)


AskedBos = Literal["auto", "first", "every", "never"]


class CalibratePart(Part):
    """Settings of the calibration data."""

    title = "Calibration"

    data: Annotated[
        str,
        Word("dataset"),
        BeforeValidator(text_of),
        _RESULT,
        Shown.COMMON,
        Field(
            description="Calibrate on wikitext2, c4, embedded, a datasets id or your file. Text: also ptb, a folder, and self "
            "(generated by the dense model; self:prompts.jsonl: its answers); files are .txt, .jsonl or .parquet; several with "
            "shares: self=0.5,wikitext2=0.5. Images: digits, a folder of classes, .parquet, or a datasets id."
        ),
    ] = "wikitext2"
    samples: Annotated[
        int, Word("nsamples"), _RESULT, Shown.COMMON, Field(description="Number of calibration samples.", ge=1)
    ] = 128
    seqlen: Annotated[
        int | None,
        _RESULT,
        Shown.COMMON,
        Field(description="Tokens per sample and per perplexity window. [min(2048, model's limit)]", ge=2),
    ] = None
    calibrate_on: Annotated[
        Literal["all", "generated"],
        _RESULT,
        Field(
            description="Positions that count in the statistics: all, or only generated ones, with the rest as context. Text "
            "without information on who wrote it counts whole."
        ),
    ] = "all"
    bos: Annotated[
        AskedBos,
        Decides.RESULT | Decides.MEASUREMENT,
        Field(
            description="Where the BOS token stands, in calibration and perplexity: at the start of the "
            "text, of every window, or never; auto follows the tokenizer, unless it adds BOS and the dense model is clearly "
            "better (by 5 % in perplexity, on a few windows) with BOS in every window."
        ),
    ] = "auto"
    seed: Annotated[
        int,
        Decides.RESULT,
        Shown.COMMON,
        Field(description="Random seed.", ge=-(2**63), lt=2**63),
    ] = 0
    batch_size: Annotated[
        int | None,
        Decides.ROUNDING | Decides.COST,
        Field(description="Samples per forward pass. [about 512 tokens on a CPU, 4096 elsewhere]", ge=1, le=2**31 - 1),
    ] = None
    activation_memory: Annotated[
        float | None,
        Decides.COST,
        Field(
            description="GiB of calibration activations to keep in memory; the rest goes to a temporary file and is read "
            "back batch by batch. [all in memory]",
            ge=0,
        ),
    ] = None
    device_activation_memory: Annotated[
        float | None,
        Decides.COST,
        Field(
            description="GiB of calibration activations to keep on a GPU; the rest goes to host memory, within "
            "activation_memory. [half of the free GPU memory]",
            ge=0,
        ),
    ] = None
    propagation: Annotated[
        Literal["block", "sequential", "dense"],
        _RESULT,
        Field(
            description="block: statistics of a block from its dense weights, as in the papers; sequential: each matrix "
            "from the inputs given by its pruned predecessors, in one pass (faster); dense: each matrix from its inputs in "
            "the dense model, in one pass, so that all methods and patterns share the same statistics."
        ),
    ] = "block"

    @property
    def is_own(self) -> bool:
        """Whether the dense model generates part of it."""
        return any(source.is_own for source in split_sources(self.data))


# Between dots or stars, since the 1 of `fc1` and the `?` of `?_proj` are no block numbers; never at the end of a name.
_WHOLE = re.compile(r"(?:^|(?<=[.*]))((?:\d|\?|\[!?[^]]+\])+)(?=[.*])")
_ONE = re.compile(r"\d|\?|\[!?[^]]+\]")


def tells_numbers_apart(glob: str) -> bool:
    """Return whether a pattern can match one block but not another of its kind, like `model.layers.3.*`."""
    return any(all(map(_may_be_digit, _ONE.findall(found))) for found in _WHOLE.findall(glob))


def _may_be_digit(one: str) -> bool:
    return any(fnmatchcase(digit, one) for digit in "0123456789")


def tells_experts_apart(glob: str) -> bool:
    """Return whether a pattern can match one expert but not another: `*.experts.3.*`, `*.experts.down_proj[3]`."""
    _, named, behind = glob.rpartition("expert")
    return bool(re.search(r"\[\d+\]$", glob)) or bool(named and tells_numbers_apart(behind))


def refuse_numbers(globs: Iterable[str], field: str, removed: Collection[str]) -> BadInput | None:
    """Return the error in name patterns that depend on block or expert numbers in a run that removes some, or None.

    Args:
        globs: the patterns.
        field: the setting that holds them.
        removed: the kinds of removed parts.
    """
    blocks = "blocks" in removed
    experts = "experts" in removed
    for glob in globs:
        if (blocks and tells_numbers_apart(glob)) or (experts and tells_experts_apart(glob)):
            cause = f"{glob!r} depends on numbers, and removal renumbers the rest"
            fix: Words = (
                "remove the parts in a separate run, and use the names that it shows: ",
                Command("inspect", "FOLDER"),
            )
            return BadInput(cause, field=field, value=glob, fix=fix)
    return None
