"""The experts of a GGUF file, found by the format alone: names and metadata identify their bytes and their routers.

So they can be scored (by their outputs in llama.cpp or by their weights) and cut even if transformers has no class for the
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput, UnsupportedModel, VerificationError
from coprune.base.progress import Reporter
from coprune.gguf_files.llama_cpp import WATCHED, LlamaCpp
from coprune.gguf_files.metadata import architecture
from coprune.gguf_files.removed_parts import BLOCK, by_expert
from coprune.gguf_files.slices import Slice, Sliced
from coprune.model.checkpoint.gguf_header import gguf_parts
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.checkpoint.mapped_gguf import decode_into, shape_of

_BESIDE = re.compile(r"exp|tid2eid")
"""Matches names of the experts' tensors …"""
_SHARED = re.compile(r"shexp")
"""… except shared experts, which process every token."""
_STRETCH = 1 << 18
"""Number of weights decoded at a time: fits the CPU cache without too many calls."""


@dataclass(frozen=True)
class FileMixture:
    """The experts of a block."""

    block: str
    count: int
    top: int
    """Number of experts per token."""
    groups: int
    """Number of equal groups of experts, of which a token uses `used`; 1 if any experts may be chosen together."""
    used: int


class ExpertFile(Sliced):
    """A GGUF file whose blocks hold experts."""

    def __init__(self, file: GgufFile) -> None:
        """Open a file.

        Raises:
            BadInput: it cannot be read.
            UnsupportedModel: it has no experts, or the format does not describe them sufficiently.
        """
        super().__init__(file)
        self._by_block: dict[str, dict[str, Any]] = {}
        for stored in self.tensors:
            if found := BLOCK.fullmatch(stored.name):
                self._by_block.setdefault(f"blk.{found[1]}", {})[found[2]] = stored
        self.blocks = len(self._by_block)
        if not self.mixtures:
            raise UnsupportedModel(f"{file.name} has no mixture of experts that tokens are routed to")

    @cached_property
    def mixtures(self) -> dict[str, FileMixture]:
        """The mixtures by block. Raises UnsupportedModel for one that cannot be cut."""
        found = {}
        for block, own in self._by_block.items():
            if (router := own.get("ffn_gate_inp.weight")) is None:
                continue
            count = len(router.data)
            other = next((n for n in own if _BESIDE.search(n) and not _SHARED.search(n) and not by_expert(n)), None)
            if other is not None:
                raise UnsupportedModel(f"{block}.{other} of {self.file.name} distinguishes experts in an unknown way")
            tables = [name for name in own if by_expert(name)]
            wrong = next((name for name in tables if len(own[name].data) != count), None)
            if wrong is not None or not any(name.partition(".")[0].endswith("_exps") for name in tables):
                raise UnsupportedModel(f"{block} of {self.file.name} does not have {count} experts in its tensors")
            if (said := self._number("expert_count", 0)) != count:
                raise UnsupportedModel(f"{block} of {self.file.name} has {count} experts, but its metadata say {said}")
            groups = self._number("expert_group_count", 1)
            used = self._number("expert_group_used_count", 1)
            found[block] = FileMixture(block, count, self._number("expert_used_count", count), groups, used)
        return found

    def _number(self, key: str, usual: int) -> int:
        """Return a metadata number that is the same for every block."""
        field = self.fields.get(f"{self.arch}.{key}")
        if field is None:
            return usual
        if type(field.value) is not int:
            raise UnsupportedModel(f"{self.file.name} has a different {key} in every block, which is not supported")
        return field.value or usual

    @staticmethod
    def architecture_of(file: GgufFile) -> str:
        """Return a file's architecture. Raises BadInput if the file cannot be read."""
        return architecture(gguf_reader(next(iter(gguf_parts(file.path))), "model"))

    @property
    def positions(self) -> int:
        """Maximum number of tokens of a text."""
        return self._number("context_length", 2048)

    def parameters_of(self, kept: Mapping[str, Sequence[int]]) -> int:
        """Return the number of remaining weights. kept: numbers of the kept experts, by block."""
        gone = 0
        for block, own in kept.items():
            count = self.mixtures[block].count
            for name, stored in self._by_block[block].items():
                gone += int(stored.n_elements) // count * (count - len(own)) if by_expert(name) else 0
        return self.parameters - gone

    def routers(self) -> Iterator[bytes]:
        """Yield the routers' bytes."""
        for block in self.mixtures:
            yield self._by_block[block]["ffn_gate_inp.weight"].data.tobytes()

    def experts_of(self, block: str) -> Iterator[tuple[int, Tensor]]:
        """Yield every expert's weights in chunks of float32, each with the expert's number."""
        for name, stored in self._by_block[block].items():
            if not name.partition(".")[0].endswith("_exps") or not name.endswith(".weight"):
                continue
            shape = shape_of(stored)
            data = stored.data
            rows = max(1, _STRETCH // shape[-1])
            out = torch.empty(rows * shape[-1])
            for expert in range(len(data)):
                whole = data[expert].reshape(-1, data.shape[-1])
                for start in range(0, len(whole), rows):
                    some = whole[start : start + rows]
                    part = out[: len(some) * shape[-1]]
                    decode_into(stored, some, part)
                    yield expert, part
            self._mapped.let_go()

    def cut(self, target: Path, kept: Mapping[str, Sequence[int]], reporter: Reporter) -> None:
        """Write the file with some of its experts.

        Args:
            target: the new file.
            kept: numbers of the kept experts, equally many in every block.
            reporter: shows the progress.

        Raises:
            BadInput: the target exists.
            VerificationError: the written bytes differ from the source's.
        """
        slices = {}
        for stored in self.tensors:
            found = BLOCK.fullmatch(stored.name)
            own = None if found is None else kept.get(f"blk.{found[1]}")
            rows = own if found is not None and by_expert(found[2]) else None
            slices[stored.name] = Slice(stored.name, None if rows is None else np.array(rows))
        (left,) = {len(own) for own in kept.values()}
        key = f"{self.arch}.expert_count"
        self.write(target, slices, {**self.fields, key: replace(self.fields[key], value=left)}, reporter)


See = Callable[[str, Tensor, Tensor], None]
"""Takes a block, the experts of each token (T × k int64), and their gated outputs (T × k × H)."""


def watch_experts(file: ExpertFile, texts: Sequence[Sequence[int]], see: See, reporter: Reporter) -> None:
    """Run texts through llama.cpp and observe the experts' outputs.

    Args:
        file: the file.
        texts: token ids, each from its beginning.
        see: called with the outputs.
        reporter: shows the progress.

    Raises:
        BadInput: llama.cpp cannot run the file.
        UnsupportedModel: it does not expose the outputs.
    """
    watched = _Watched({block: mixture.top for block, mixture in file.mixtures.items()}, see)
    first, longest = gguf_parts(file.file.path)[0], max(map(len, texts))
    with (
        closing(LlamaCpp(first, context=longest, see=watched.takers())) as model,
        reporter.bar("Scoring experts", sum(map(len, texts))) as advance,
    ):
        for text in texts:
            model.forget()
            for start in range(0, len(text), WATCHED):
                watched.tokens = len(text[start : start + WATCHED])
                # Without all logits, the last block is computed for the last token only.
                model.read(text[start : start + WATCHED], all_logits=True)
                watched.pass_on()
                advance(watched.tokens)
    if not watched.seen:
        raise UnsupportedModel(f"llama.cpp does not expose the outputs of the experts of {file.file.name}")


class _Watched:
    """Collects the tensors of a block's experts and passes them on together, block by block."""

    def __init__(self, tops: Mapping[str, int], see: See) -> None:
        self._tops, self._see = tops, see
        self._block = ""
        self._found: dict[str, Any] = {}
        self.tokens = 0
        """Number of tokens in the current call."""
        self.seen = False

    def takers(self) -> dict[str, Callable[[Any], None]]:
        """Return the callbacks by the name of the tensor in llama.cpp."""
        kinds = {"topk": "chosen", "down": "answers", "weighted": "answers"}
        return {
            f"ffn_moe_{name}-{block[4:]}": partial(self._take, block, kind)
            for block in self._tops
            for name, kind in kinds.items()
        }

    def _take(self, block: str, kind: str, values: Any) -> None:
        if block != self._block:
            self.pass_on()
        # The last output wins: if gates are applied before the experts, there is no product after them.
        self._block, self._found[kind] = block, values

    def pass_on(self) -> None:
        """Pass on the last computed block."""
        if self._found.keys() == {"chosen", "answers"}:
            index = _first_columns(self._found["chosen"].view(np.int32), self.tokens, self._tops[self._block])
            answers = torch.from_numpy(self._found["answers"].view(np.float32))
            self._see(self._block, index, answers.view(*index.shape, -1))
            self.seen = True
        self._found.clear()


def _first_columns(values: Any, rows: int, columns: int) -> Tensor:
    """Return the first columns of a matrix as int64. values: from its first value to the last one needed."""
    width = columns if rows == 1 else (len(values) - columns) // (rows - 1)
    whole = np.zeros(rows * width, dtype=np.int64)
    whole[: len(values)] = values
    return torch.from_numpy(whole.reshape(rows, width)[:, :columns].copy())


class FileTokenizer:
    """A file's tokenizer in llama.cpp."""

    is_fast = False

    def __init__(self, model: LlamaCpp) -> None:
        self._model = model

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return the ids of a text's tokens as `input_ids`."""
        return {"input_ids": self._model.tokenize(text)}


@contextmanager
def tokenizer_of(file: ExpertFile) -> Iterator[FileTokenizer]:
    """Yield a file's tokenizer. Raises BadInput if llama.cpp cannot load it."""
    with closing(LlamaCpp(gguf_parts(file.file.path)[0], context=8, see={})) as model:
        yield FileTokenizer(model)


def require_runs(file: GgufFile) -> None:
    """Raise VerificationError if llama.cpp cannot run a file."""
    try:
        with closing(LlamaCpp(file.path, context=8, see={})) as model:
            finite = bool(torch.isfinite(model.logits([0, 1])).all())
    except BadInput as error:
        raise VerificationError(f"llama.cpp cannot run the written file: {error}") from error
    if not finite:
        raise VerificationError(f"{file.name} does not give finite logits in llama.cpp")
