"""Make the files of candidates, each once under a key of everything that determines its bytes, so that a fit can resume."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coprune.base.files import whole_folder, write_durably
from coprune.base.progress import Reporter
from coprune.data.bos import begun_by
from coprune.data.tokenizing import encode
from coprune.data.windows import calibration_windows
from coprune.fitting.calibration import all_windows, read_passages, write_passages
from coprune.fitting.candidates import AS_GIVEN, DENSE, EXACT, FOREIGN, GIVEN, MIXED, Candidate, Cut, is_step
from coprune.fitting.clock import Clock, Mark
from coprune.fitting.fit_notes import Asked
from coprune.fitting.reader import Reader
from coprune.gguf_files.copied_tensors import Quant, quantize_beside
from coprune.gguf_files.importance import importance_of, importance_of_head, read_importance, write_importance
from coprune.gguf_files.llama_cpp import Quantisation
from coprune.gguf_files.sensitivity import sensitivity_of
from coprune.gguf_files.types_by_tensor import Losses, expected_seconds, losses_of
from coprune.model.checkpoint.gguf_header import read_gguf_headers
from coprune.model.checkpoint.load import load_model, load_tokenizer, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder, locate
from coprune.run.step import source_named
from coprune.runner import runner
from coprune.runner.prune_call import prune
from coprune.steps.export import export
from coprune.steps.trim import tokens_kept
from coprune.store.store import Key, Store, key_of
from coprune.vocabulary.counts import sources_of

SAMPLES, SEQLEN = 16, 256
"""Number and length of the samples on which statistics are measured."""
_HEAD_TOKENS = 512
"""Tokens on which the head's inputs are measured."""
_SHORT = 1024
"""Maximum tokens of a text that is used whole instead of sampled."""
MIXED_SAMPLES = 8
"""Samples of `SEQLEN` tokens that sensitivities are measured on."""
_SAID = (("q8_0", 7.5), ("q6_k", 6.0), ("q5_k_m", 5.0), ("q4_k_m", 4.0), ("q3_k_m", 3.0), ("q2_k", 0.0))
"""File type of a mixture, also used for tensors without a chosen type, by its minimum bits per weight."""
_RUN, _MATRIX = ".run", ".imatrix.gguf"
_AS_THEY_ARE = (EXACT, GIVEN, FOREIGN)
"""Types of the dense model's candidates that need no calibration."""


class Done(BaseModel):
    """Record of finished work; its note has the seconds."""

    sources: tuple[str, str] = ("", "")
    """For a quant: the names of its 16-bit source file and of its importance matrix."""


class Making:
    """Maker of candidates in a fit's folder."""

    def __init__(self, folder: Path, asked: Asked, reporter: Reporter, began: float | None = None) -> None:
        """Create a maker for a folder. Files are made when they are first needed. began: as for a `Clock`."""
        self.folder, self.asked, self.reporter = folder, asked, reporter
        self.clock, self.done = Clock(began), Store(folder / "done")
        self._tokenizers: dict[Path, PreTrainedTokenizerBase] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the dense model."""
        return load_tokenizer(self.source)

    @cached_property
    def source(self) -> Location:
        """The model's files."""
        return locate(self.asked.model)  # cached, since it reads a GGUF file's vocabulary

    @cached_property
    def may_have_experts(self) -> bool:
        """Whether the model may have experts: False only if its GGUF file records none."""
        file = locate(self.asked.like) if self.asked.like is not None else self.source
        if not isinstance(file, GgufFile):
            return True
        integers = read_gguf_headers(file.path)[0][1]
        return any(name.endswith(".expert_count") and count for name, count in integers.items())

    @property
    def text(self) -> Path:
        """File of calibration text, one document per row."""
        return self.folder / "text" / "text.jsonl"

    def key(self, step: str, candidate: Candidate, **more: Any) -> Key:
        """Return the key of a candidate's file or of its measurements."""
        calibrated = candidate.cut != DENSE or candidate.type not in _AS_THEY_ARE
        text = hashlib.sha256(self.text.read_bytes()).hexdigest() if calibrated and self.text.exists() else None
        if own := {part: self.asked.digests_of_steps[part] for part in candidate.cut.removed if is_step(part)}:
            more["steps"] = own
        return key_of(step, 1, candidate=candidate.key, text=text, **self.asked.contents, **more)

    def note(self, key: Key, mark: Mark, record: Done | None = None) -> None:
        """Record finished work with the seconds since a mark, added to those recorded before."""
        known = self.done.find(key, Done)
        before = 0.0 if known is None else known.seconds
        self.done.complete(key, record or Done(), before + self.clock.since(mark))

    def took(self, key: Key) -> float:
        """Return the seconds of finished work; 0 if it was not done."""
        found = self.done.find(key, Done)
        return 0.0 if found is None else found.seconds

    def took_to_make(self, candidate: Candidate) -> float:
        """Return the seconds of making a candidate's file, without its cut, or those after which that was interrupted."""
        if candidate.type == EXACT:
            return self.took(self._written(candidate.cut)[0])
        return self.took(self.key("quant", candidate)) or self.took(self.interrupted(candidate))

    def interrupted(self, candidate: Candidate) -> Key:
        """Return the key under which the time of an interrupted quantisation is recorded."""
        return self.key("interrupted", candidate)

    def is_made(self, cut: Cut) -> bool:
        """Return whether a cut was made, in this process or an earlier one."""
        return bool(self.took_to_make(Candidate(cut, EXACT)))

    def expected_to_cut(self, cut: Cut) -> float:
        """Return the expected seconds of making and writing a cut, from earlier cuts or from writing the dense model."""
        written = self.took_to_make(Candidate(DENSE, EXACT))
        # Other cuts are loaded twice, written, and then exported.
        first, after = (written, 0.0) if self._is_in_file(cut) else (3 * written, written)
        return fmean(self.done.seconds("cut") or [first]) + after

    def file(self, candidate: Candidate, until: float = math.inf) -> Path:
        """Return a candidate's file, making it if needed. Raises CopruneError if that fails.

        until: deadline in `time.perf_counter()`, at which its quantisation is interrupted.
        """
        if candidate == AS_GIVEN:
            return self.source.path
        if candidate.type == FOREIGN:
            return self.asked.foreign[candidate]
        exact = self.exact(candidate.cut)
        if candidate.type == EXACT:
            return exact
        key = self.key("quant", candidate)
        target = self._quant(key)

        def make() -> None:
            self.reporter.say(f"Making {candidate.name}")
            asked = self.quantisation(candidate)
            write_durably(target, lambda path: quantize_beside(self._quants(matrix), exact, path, asked, until))

        if not target.exists():
            matrix = self._importance(candidate.cut)
            self._once(key, target, make, Done(sources=(exact.name, matrix.name)))
        return target

    def quantisation(self, candidate: Candidate) -> Quantisation:
        """Return the quantisation of a candidate, measuring its importance matrix if needed."""
        importance = read_importance(self._importance(candidate.cut))
        if candidate.type != MIXED:
            return Quantisation(candidate.type, importance, candidate.embedding)
        said = next(kind for kind, least in _SAID if candidate.bits >= least)
        return Quantisation(said, importance, types=dict(candidate.types))

    def losses(self) -> Losses:
        """Measure the loss of each type for each tensor of the dense model. Raises CopruneError if that fails."""
        exact = self.exact(DENSE)
        _, data = self._calibration_data(self.tokenizer)
        if isinstance(data, str):
            data = calibration_windows(data, self.tokenizer, MIXED_SAMPLES, SEQLEN, self.asked.seed).tokens
        sensitivity = sensitivity_of(exact, begun_by(self.tokenizer, data), self.reporter)
        return losses_of(exact, read_importance(self._importance(DENSE)), sensitivity, self.reporter)

    def expected_losses(self) -> float:
        """Return the expected seconds of `losses`, once an importance matrix of the dense model was measured."""
        # The pass backward over half as many tokens took up to twice as long, at 135 million and at 1.5 billion parameters.
        passes = 2 * self.took(self.key("importance", Candidate(DENSE, "importance")))
        return passes + expected_seconds(self.exact(DENSE))

    def _quant(self, key: Key) -> Path:
        return self.folder / "files" / f"{key}.gguf"

    def _quants(self, matrix: Path) -> list[Quant]:
        """List the existing quants made with an importance matrix."""
        files = sorted((self.folder / "files").glob("quant-*.gguf"))
        made = [(file, self.done.find(Key(*file.stem.split("-")), Done)) for file in files]
        said = [(file, *note.record.sources) for file, note in made if note is not None]
        return [Quant(file, file.with_name(exact)) for file, exact, own in said if own == matrix.name]

    def drop(self, candidate: Candidate) -> None:
        """Remove a candidate's file."""
        if candidate.type not in _AS_THEY_ARE:
            self._quant(self.key("quant", candidate)).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all files and folders of models, but keep their records."""
        for made in (*self.folder.glob("files/*"), *self.folder.glob("cuts/*")):
            if made.is_dir() and made.suffix != _RUN:
                shutil.rmtree(made)
            elif not made.name.endswith((_RUN, _MATRIX)):
                made.unlink()

    def _written(self, cut: Cut) -> tuple[Key, Path]:
        """Return the key and path of a cut in 16 bits: a file for llama.cpp, a folder for transformers."""
        in_folder = self.asked.runtime == "transformers"
        own = cut != DENSE and (in_folder or self._is_in_file(cut))
        key = self.key("cut" if own else "exact", Candidate(cut, EXACT))
        return key, self.folder / "cuts" / str(key) if in_folder else self.folder / "files" / f"{key}.gguf"

    def exact(self, cut: Cut) -> Path:
        """Return a cut in 16 bits, making it if needed. Raises CopruneError if that fails."""
        key, target = self._written(cut)
        if key.step == "cut":
            return self._cut(cut)
        if self.asked.runtime == "transformers" and isinstance(self.source, ModelFolder):
            return self.source.path

        def make() -> None:
            self.reporter.say(f"Writing {cut.name or 'the dense model'} as {EXACT}")
            if self.asked.runtime != "transformers":
                export(source, target, like=self.asked.like, type=EXACT, quiet=True)
                return
            model, tokenizer = load_model(self.source, "bfloat16")
            with whole_folder(target) as out, quiet_transformers():
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)

        if not target.exists():
            source = self.asked.model if cut == DENSE else self._cut(cut)
            self._once(key, target, make)
        return target

    def _importance(self, cut: Cut) -> Path:
        """Return the importance matrix of a cut, measuring it if needed; a smaller vocabulary does not need its own."""
        seen = cut if cut.others or cut.tokens else DENSE
        key = self.key("importance", Candidate(seen, "importance"))
        target = self.folder / "files" / f"{key}{_MATRIX}"

        def make() -> None:
            ids, data = self._calibration_data(self._vocabulary_of(seen)[0])
            found = importance_of(exact, data, self.reporter)
            write_importance(target, {**found, **importance_of_head(exact, ids[:_HEAD_TOKENS])})

        if not target.exists():
            exact = self.exact(seen)
            self._once(key, target, make)
        return target

    def _is_in_file(self, cut: Cut) -> bool:
        """Return whether a cut only removes vocabulary rows of a GGUF file, so that the others can be copied."""
        tokens_only = bool(cut.removed) and not cut.others and self.asked.runtime == "llama.cpp"
        return tokens_only and isinstance(self.source, GgufFile)

    def run_of(self, cut: Cut) -> Path:
        """Return the folder of the run that makes a cut."""
        return self.folder / "cuts" / f"{self.key('cut', Candidate(cut, EXACT))}{_RUN}"

    def _cut(self, cut: Cut) -> Path:
        """Return a cut as a folder, or as a 16-bit file if it was made in the file."""
        key, in_file, before = self.key("cut", Candidate(cut, EXACT)), self._is_in_file(cut), cut.before
        target = self._written(cut)[1] if in_file else self.folder / "cuts" / str(key)
        kind, more = cut.removed[-1].partition("=")[0], dict[str, Any](remove=cut.removed[-1])
        if cut.tokens:
            more |= {"finetune": "distill", "finetune_tokens": cut.tokens}

        def make() -> None:
            if is_step(cut.removed[-1]):
                self._do_step(cut, base, target)
                return
            self.reporter.say(f"Removing {cut.name}")
            text = str(self._text_of_cuts())
            if kind == "vocabulary":
                more.update(vocabulary_text=[text, *sources_of("\n".join(self._texts()))], vocabulary_force=True)
            prune(
                base,
                dataset=text,
                nsamples=SAMPLES,
                seqlen=SEQLEN,
                seed=self.asked.seed,
                evaluate=False,
                layer_error=False,
                gate=False,
                prompt="",
                save=self.run_of(cut),
                save_model=target,
                overwrite=True,
                quiet=self.reporter.quiet,
                **more,
            )

        if not target.exists():
            if before is not None and before != DENSE:
                base = str(self._cut(before))
            else:
                base = str(self.exact(DENSE)) if in_file or self.asked.runtime == "transformers" else self.asked.model
            self._once(key, target, make)
        return target

    def _do_step(self, cut: Cut, base: str, target: Path) -> None:
        """Make a cut whose last part is a step, of what is before it."""
        self.reporter.say(f"Making {cut.name}")
        step = replace(self.asked.steps[cut.removed[-1]], folder=self.run_of(cut))
        made = runner.make([step], source_named(base), self.reporter).model or step.model
        made.replace(target)

    def _once(self, key: Key, target: Path, make: Callable[[], None], record: Done | None = None) -> None:
        """Make a file or folder unless it exists, and record the time, without that of its sources."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.done.claim(key):
            if target.exists():  # another worker has made it meanwhile
                return
            mark = self.clock.mark()
            make()
            if self.done.find(key, Done) is None:  # otherwise its time was recorded before
                self.note(key, mark, record)

    def _calibration_data(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str | Tensor]:
        """Return the calibration text as token ids, and the data to measure on: its file, or all windows of a short text."""
        ids = encode(tokenizer, "\n".join(self._texts()))["input_ids"]
        # Sampled windows would be longer than a short text, or nearly identical.
        return ids, str(self.text) if len(ids) > _SHORT else all_windows(ids, SEQLEN)

    def _texts(self) -> list[str]:
        return [passage.text for passage in read_passages(self.text)]

    def _text_of_cuts(self) -> Path:
        """Return the text for making and training cuts, without the items that candidates are judged on first."""
        file = self.text.with_name("cuts.jsonl")
        write_passages(file, [passage for passage in read_passages(self.text) if not passage.judging])
        return file

    def reader(self, file: Path, cut: Cut) -> Reader:
        """Open a cut's file with its tokenizer."""
        return Reader.open(file, *self._vocabulary_of(cut))

    def _vocabulary_of(self, cut: Cut) -> tuple[PreTrainedTokenizerBase, list[int] | None]:
        """Return a cut's tokenizer, and the dense model's ids of its tokens if the vocabulary is smaller."""
        if cut.fewer is None:
            return self.tokenizer, None
        place = self._cut(cut.fewer)
        if place not in self._tokenizers:
            self._tokenizers[place] = load_tokenizer(locate(place))
        return self._tokenizers[place], tokens_kept(self.run_of(cut.fewer))
