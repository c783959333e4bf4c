"""The importance of each input of a matrix for llama.cpp's quantiser (its imatrix): mean squares from a walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.files import write_durably
from coprune.base.precision import quickest_on_cpu
from coprune.base.progress import Reporter
from coprune.data.bos import begun_by
from coprune.data.windows import calibration_windows
from coprune.gguf_files.file_plan import Example, read_example
from coprune.gguf_files.llama_cpp import TOKEN_EMBEDDINGS, WATCHED, LlamaCpp
from coprune.gguf_files.smaller import Exported, exported
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.deferred import filled
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile, Location
from coprune.model.generation import positions_of
from coprune.model.loaded_model import open_model
from coprune.model.matrices import Matrix
from coprune.model.matrix_choice import Chosen, choose_matrices
from coprune.model.transformers_private import revert_conversion, saved_tensors, set_conversions_to_revert
from coprune.model.walk.block_events import MatricesReady
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.model.walk.recording import Dense, Moves, record_batches
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.model.walk.walk import Walk
from coprune.recipe.parts import DtypeName, ModelPart

Importance = Mapping[str, Tensor]
"""Mean squares of the inputs (experts × inputs, or 1 × inputs), float32, by the tensor's name in the file."""
_SAMPLES, _SEQLEN = 16, 512
_SUMS, _COUNTS = ".in_sum2", ".counts"
HEAD, _BEFORE_HEAD = "output.weight", "result_norm"
"""Names in llama.cpp of a tensor and of the final hidden states."""
_LEAST = 1e-10
"""Replacement for zero, which would leave a weight's rounding arbitrary."""


@dataclass(frozen=True)
class Asked:
    """An importance matrix for the quantiser: a file or text to measure it on, and where to save it."""

    file: Path | None = None
    data: str | None = None
    save: Path | None = None

    def find(self, location: Location, reporter: Reporter) -> Importance | Mapping[str, Tensor] | None:
        """Return the importance, read from the file or measured under the checkpoint's names; None if not requested."""
        if self.file is not None:
            return read_importance(self.file)
        return None if self.data is None else measured(location, self.data, reporter)


@dataclass(frozen=True)
class TextWalk:
    """A model with calibration text to run through it, block by block."""

    location: Location
    model: Any
    chosen: Chosen
    """All matrices of the blocks, chosen before a forward pass has shown which parameters are mixtures."""
    proven: ProvenModel
    tokens: Tensor

    def walk(self, statistic: type[Statistic], moves: Moves, advance: Callable[[float], None]) -> Walk:
        """Return the walk over its blocks."""
        recording = record_batches(self.proven, [*self.tokens.split(1)])
        return Walk(self.proven, recording, statistic, moves, advance=advance)

    def by_name(self, values: Callable[[Matrix], Tensor]) -> dict[str, Tensor]:
        """Return a value per weight under the checkpoint's names and shapes; NaN outside these matrices.

        values: of a matrix, broadcastable to outputs × inputs, float32; they are not expanded in memory.
        """
        return by_name(self.location, self.model, self.chosen, values)


def read_text(location: Location, data: str | Tensor, dtype: DtypeName) -> TextWalk:
    """Open a model and prepare to walk text through it.

    Args:
        location: the model.
        data: a corpus, or samples of token ids (N × S).
        dtype: of its weights.

    Raises:
        BadInput: the text cannot be read.
        UnsupportedModel: the model cannot be walked.
    """
    asked = ModelPart(name=str(location.path), dtype=dtype, device="cpu", check_memory=False)
    loaded = open_model(asked, stream=True)
    model, tokenizer = loaded.model, loaded.processor
    if isinstance(data, str):
        seqlen = min(_SEQLEN, positions_of(model) or _SEQLEN)
        data = begun_by(tokenizer, calibration_windows(data, tokenizer, _SAMPLES, seqlen, seed=0).tokens)
    blocks = find_blocks(model)
    chosen = choose_matrices(model, blocks)
    proven = prove_replay(FoundModel(loaded.weights, blocks, chosen), data[:1])
    return TextWalk(location, model, chosen, proven, data)


@torch.no_grad()
def measured(location: Location, data: str | Tensor, reporter: Reporter) -> dict[str, Tensor]:
    """Measure the inputs of every matrix in a model's blocks.

    Args:
        location: the model.
        data: as in `read_text`.
        reporter: shows the progress.

    Returns:
        Tensors by the checkpoint's names, in the weights' shapes: every row holds the mean squares of its inputs, or NaN
        outside these matrices. They take the memory of one row.

    Raises:
        BadInput, UnsupportedModel: as `read_text`.
    """
    # bfloat16 changes the mean squares by less than another sample of text would.
    text = read_text(location, data, quickest_on_cpu())
    with reporter.bar("Importance of the weights", len(text.proven.blocks)) as advance:
        seen: dict[str, Tensor] = {}
        for event in text.walk(InputNorm, Dense(), advance):
            if isinstance(event, MatricesReady):
                seen |= {name: statistic.mean_square for name, statistic in event.statistics().items()}
    # An expert without tokens has uniform importance.
    return text.by_name(lambda matrix: seen.get(matrix.name, torch.ones(matrix.shape[1])).clamp_min(_LEAST)[None])


def by_name(location: Location, model: Any, chosen: Chosen, values: Callable[[Matrix], Tensor]) -> dict[str, Tensor]:
    """Return a value per weight of an open model, as `TextWalk.by_name`."""
    if isinstance(location, GgufFile):  # its parameters have the model's own names
        set_conversions_to_revert(model, None)
    found, nan = _by_parameter(chosen, values), torch.tensor(torch.nan)
    state = {name: model.get_parameter_or_buffer(name) for name in saved_tensors(model)}
    own = {name: found.get(id(one), nan.expand(one.shape)) for name, one in state.items()}
    return revert_conversion(model, own)


def _by_parameter(chosen: Chosen, values: Callable[[Matrix], Tensor]) -> dict[int, Tensor]:
    """Return values of matrices in their parameters' shapes, by the parameters' ids."""
    parts: dict[int, list[tuple[Matrix, Tensor]]] = {}
    for matrix in chosen.all():
        own = values(matrix)
        same = filled(own if matrix.input_dim == 1 else own.T, matrix.stored().shape)
        parts.setdefault(id(getattr(matrix.owner, matrix.attribute)), []).append((matrix, same))
    found = {}
    for number, own_parts in parts.items():
        first, same = own_parts[0]
        whole = getattr(first.owner, first.attribute)
        if first.expert is None:
            found[number] = same if same.shape == whole.shape else same.reshape(whole.shape)
        elif len(own_parts) == first.stacked:
            found[number] = (torch.cat if whole.ndim == 2 else torch.stack)([one for _, one in own_parts])
    return found


def in_file(means: Mapping[str, Tensor], names: Mapping[str, str], example: Example, source: Exported) -> Importance:
    """Convert measured values to the tensors of a file.

    Args:
        means: from `measured`.
        names: of the file's tensors, each with its name in the example.
        example: the template file.
        source: the model to write.
    """
    found = dict[str, Tensor]()
    for name, own in names.items():
        values = found_in(means, own, example, source)
        if values is None:
            continue
        rows = values[:, 0] if values.ndim > 2 else values[:1]
        if bool(rows.isfinite().all()):
            found[name] = rows.clone()  # a view would keep all of them alive
    return found


def found_in(values: Mapping[str, Tensor], name: str, example: Example, source: Exported) -> Tensor | None:
    """Arrange values of weights like a tensor of a file; None if it is not a matrix.

    Args:
        values: by the checkpoint's names and in its shapes, from `TextWalk.by_name`.
        name: of the tensor in the example.
        example: the template file.
        source: the model to write.
    """
    if not example.pieces[name] or len(example.shapes[name]) < 2:
        return None
    try:
        return example.values(name, replace(source, tensors=values))
    except UnsupportedModel:  # one of several equal tensors, so not a block's matrix
        return None


def importance_of(file: Path, data: str | Tensor, reporter: Reporter) -> Importance:
    """Measure the importance for a file's own tensors. data: as for `measured`. Raises as `measured` and `read_example`."""
    location = GgufFile(file, file.name)
    source = exported(location)
    example = read_example(location, source, reporter)
    return in_file(measured(location, data, reporter), {name: name for name in example.pieces}, example, source)


def importance_of_head(file: Path, tokens: Sequence[int]) -> Importance:
    """Measure the inputs of a file's head (which may be its embedding table) on some tokens in llama.cpp."""
    tensors = {one.name: int(one.shape[0]) for one in gguf_reader(file, field="model").tensors}
    name = next(one for one in (HEAD, TOKEN_EMBEDDINGS) if one in tensors)
    seen = list[Tensor]()

    def see(values: Any) -> None:
        seen.append(torch.from_numpy(values.view(np.float32)).reshape(-1, tensors[name]).square())

    with closing(LlamaCpp(file, len(tokens), see={_BEFORE_HEAD: see})) as engine:
        for start in range(0, len(tokens), WATCHED):
            engine.read(tokens[start : start + WATCHED], all_logits=True)
    return {name: torch.cat(seen).mean(0, keepdim=True).clamp_min(_LEAST)} if seen else {}


def write_importance(file: Path, importance: Importance) -> None:
    """Write an importance matrix in llama.cpp's own format. Raises CopruneError if the disk is full."""
    from gguf import GGUFWriter

    def write(path: Path) -> None:
        with closing(GGUFWriter(path, "")) as writer:
            # llama.cpp recognises the file by this type; the package also writes an architecture.
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", ["coprune"])
            writer.add_uint32("imatrix.chunk_count", 1)
            writer.add_uint32("imatrix.chunk_size", 1)
            for name, mean in importance.items():
                writer.add_tensor(name + _SUMS, mean.numpy())
                writer.add_tensor(name + _COUNTS, np.ones((len(mean), 1), dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, write)


def read_importance(file: Path) -> Importance:
    """Read an importance matrix in llama.cpp's GGUF format. Raises BadInput if it is not one."""
    with_field = {"field": "imatrix", "value": str(file)}
    if not file.is_file():
        raise BadInput(f"{file} is not a file", **with_field, fix="name a file from llama-imatrix, or use auto or none")
    stored = {one.name: torch.from_numpy(np.array(one.data)) for one in gguf_reader(file, field="imatrix").tensors}
    found = {}
    for name, sums in stored.items():
        counts = stored.get(name.removesuffix(_SUMS) + _COUNTS)
        if not name.endswith(_SUMS) or counts is None:
            continue
        rows = sums.float().reshape(counts.numel(), -1)
        seen = counts.float().reshape(-1, 1)
        found[name.removesuffix(_SUMS)] = torch.where(seen > 0, rows / seen.clamp_min(1), 1.0).clamp_min(_LEAST)
    if not found:
        raise BadInput(
            f"{file} does not contain an importance matrix",
            **with_field,
            fix="create one with llama-imatrix, or use auto",
        )
    return found
