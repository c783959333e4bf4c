"""The folder in which candidates are made and measured: each product once, stored by its inputs, so that a killed fit resumes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import (
    BadInput,
    BrokenMask,
    CopruneError,
    NumericalError,
    OutOfMemory,
    UnsupportedModel,
    VerificationError,
)
from coprune.base.files import whole_folder, write_durably, write_text
from coprune.base.progress import Reporter
from coprune.data.tokenizing import encode
from coprune.fitting.calibration import calibration_of, own_count, own_texts, read_passages, write_passages
from coprune.fitting.candidates import AS_GIVEN, DENSE, EXACT, GIVEN, Candidate, Cut
from coprune.fitting.clock import Clock, Mark
from coprune.fitting.made import bytes_in, note_of, note_seconds, seconds_in, seconds_of
from coprune.fitting.notes import Asked, Measured, Sizes, Sources, differing, noted
from coprune.fitting.reader import Reader
from coprune.fitting.score import DenseAnswers, item_key, score_item
from coprune.fitting.tasks import Task
from coprune.gguf_files.importance import importance_of, importance_of_head, read_importance, write_importance
from coprune.gguf_files.llama_cpp import Quantisation, quantized_bytes
from coprune.gguf_files.reuse import Quant, bytes_of_rows, quantize_beside
from coprune.model.checkpoint.load import load_model, load_tokenizer, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder, locate
from coprune.runner.call import prune
from coprune.steps.export import export
from coprune.steps.trim import tokens_kept
from coprune.store.claim import claimed
from coprune.store.notes import read_note, write_note
from coprune.vocabulary.counts import sources_of

_SAMPLES, _SEQLEN = 16, 256
"""Of what statistics are measured on."""
_HEAD_TOKENS = 512
"""That the head's inputs are measured on."""
VERDICTS_FILE = "verdicts.json"
"""What the unseen half has judged."""
_CHARACTERS = 1200
"""Of the text that memory and speed are measured with."""
_MEMORY_TOKENS, _CONTEXT, _SPEED_TOKENS = 128, 2048, 24
_RUN = ".run"
_VERDICTS = (BadInput, UnsupportedModel, NumericalError, VerificationError, BrokenMask)
"""Errors that are properties of a candidate and are stored; a full disk or a lost process is not."""


class Workshop:
    """Makes and measures candidates in a folder."""

    def __init__(self, folder: Path, asked: Asked, reporter: Reporter) -> None:
        """Open a folder of measurements. Raises BadInput if it belongs to another fit."""
        self.folder, self.asked, self.reporter = folder, asked, reporter
        self._clock = Clock()
        self.paces: dict[str, float] = {}
        """Seconds of an item by the task's key, as measured by this process, in the dense model at first."""
        self._tokenizers: dict[Path, PreTrainedTokenizerBase] = {}
        self._passing: dict[Candidate, Measured] = {}
        note, facts = folder / "asked.json", asked.facts()
        if note.exists() and (others := differing(facts, note)):
            if not self._refused.exists():
                cause = f"{folder.parent} holds a fit with {' and '.join(others)}"
                raise BadInput(cause, field="output", value=str(folder.parent), fix="name another folder")
            shutil.rmtree(folder)
        self._refused.unlink(missing_ok=True)
        if not note.exists():
            write_text(note, json.dumps(facts, indent=1))
        for name in ("locks", "text"):
            (folder / name).mkdir(exist_ok=True)

    @property
    def _refused(self) -> Path:
        return self.folder / "refused.txt"

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Note an error without any verdict, after which a fit of other tasks, mended ones, may begin in the same folder."""
        try:
            yield
        except BadInput as error:
            if not (self.folder / VERDICTS_FILE).exists():
                write_text(self._refused, str(error))
            raise

    @property
    def spent(self) -> float:
        """Seconds of all that was made and measured here, also before a kill."""
        notes = self.folder.glob("*/*.seconds.json")
        return sum(map(seconds_in, notes))

    def took_to_make(self, candidate: Candidate) -> float:
        """Return the seconds of making a candidate's file, without its cut."""
        return seconds_of(self._file(candidate))

    def took_to_write(self, cut: Cut) -> float:
        """Return the seconds of writing a cut as a file."""
        return seconds_of(self._file(Candidate(cut, EXACT)))

    def expected_to_cut(self, cut: Cut) -> float:
        """Return the seconds that making a cut and writing it may take: as those before it, or as times of the dense model's."""
        written, in_file = self.took_to_write(DENSE), self._is_in_file(cut)
        notes = self.folder.glob(f"files/*.{EXACT}.gguf.seconds.json" if in_file else "cuts/*.seconds.json")
        took = [seconds_in(note) for note in notes if note != note_of(self._file(Candidate(DENSE, EXACT)))]
        first, after = (written, 0.0) if in_file else (3 * written, written)  # opened twice and written, then exported
        return fmean(took or [first]) + after

    def is_made(self, cut: Cut) -> bool:
        """Return whether a cut exists, made now or before a kill."""
        return bool(self.took_to_write(cut))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The dense model's."""
        return load_tokenizer(self.source)

    @cached_property
    def source(self) -> Location:
        """The model's files."""
        return locate(self.asked.model)  # which reads a GGUF file's vocabulary

    def known(self, candidate: Candidate) -> Measured:
        """Return the stored measurements of a candidate, or why it cannot be made now."""
        if candidate in self._passing:
            return self._passing[candidate]
        found = read_note(self._results(candidate), Measured)  # a damaged one is measured again
        return Measured() if found is None else found.record

    def measure(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]], until: float = math.inf) -> Measured:
        """Make a candidate, if it is not there, and measure what is missing of it.

        wanted: places of items by task. until: the moment of `time.perf_counter()` from which no other item is begun.
        """
        found = self.known(candidate)
        tasks = [*self.asked.tasks, *self.asked.writing]
        missing = {task.name: found.missing(task, wanted.get(task.name, ())) for task in tasks}
        if found.refused or (found.bytes and not any(missing.values())):
            return found
        mark = self._clock.mark()
        try:
            file = self.file(candidate)
            self.answer(missing)
        except CopruneError as error:
            refused = found.model_copy(update={"refused": str(error)})
            if _lacks_memory(error):  # of this machine now, where the search ends without it
                self._passing[candidate] = refused
            elif isinstance(error, _VERDICTS) and not isinstance(error.__cause__, OSError):
                self._keep(candidate, refused, mark)
            else:
                raise
            return self.known(candidate)
        reader = self.reader(file, candidate.cut)
        if not found.bytes:
            found = found.model_copy(update=self._first_figures(file, reader))
        scores = {name: {metric: dict(own) for metric, own in one.items()} for name, one in found.scores.items()}
        with self.reporter.bar(candidate.name, sum(map(len, missing.values()))) as advance:
            for task in (one for one in tasks if missing[one.name]):
                own, dense = scores.setdefault(task.key, {}), self._answered(task)
                with self._pace(task, missing[task.name]):
                    for place in missing[task.name]:
                        if time.perf_counter() > until:
                            break
                        for metric, value in score_item(reader, task, place, dense).items():
                            own.setdefault(metric, {})[place] = value
                        advance(1)
        reader.engine.close()
        self._keep(candidate, found.model_copy(update={"scores": scores}), mark)
        return self.known(candidate)

    def _keep(self, candidate: Candidate, found: Measured, mark: Mark) -> None:
        """Write what was measured. mark: when it began; what was made on the way counts by itself."""
        file, seconds = self._results(candidate), found.seconds + self._clock.since(mark)
        write_note(file, found.model_copy(update={"seconds": seconds}))
        note_seconds(file.with_suffix(".seconds.json"), seconds)

    def _results(self, candidate: Candidate) -> Path:
        return self.folder / "results" / f"{_hash(candidate.key)}.json"

    def reader(self, file: Path, cut: Cut) -> Reader:
        """Open a file of a cut."""
        return Reader.open(file, *self._vocabulary_of(cut))

    def _vocabulary_of(self, cut: Cut) -> tuple[PreTrainedTokenizerBase, list[int] | None]:
        """Return a cut's tokenizer, and the dense model's ids of its tokens where they are others."""
        if cut.fewer is None:
            return self.tokenizer, None
        place = self._cut(cut.fewer)
        if place not in self._tokenizers:
            self._tokenizers[place] = load_tokenizer(locate(place))
        return self._tokenizers[place], tokens_kept(self.run_of(cut.fewer))

    def _first_figures(self, file: Path, reader: Reader) -> dict[str, float]:
        text = next((task.items[task.seen[0]].asked for task in self.asked.tasks), "A text.")
        ids = (reader.ids(text[:_CHARACTERS]) * _MEMORY_TOKENS)[:_MEMORY_TOKENS]
        reader.engine.forget()
        reader.engine.read(ids)
        memory = reader.engine.bytes + reader.engine.context_bytes * _CONTEXT // _MEMORY_TOKENS
        seconds = []
        for token in ids[:_SPEED_TOKENS]:
            started = time.process_time()  # others of this machine take no part in it, but slow it down
            reader.engine.read([token])
            seconds.append(time.process_time() - started)
        speed = torch.get_num_threads() / min(seconds)
        return {"bytes": bytes_in(file), "memory": memory, "speed": speed}

    def bytes_of(self, candidate: Candidate) -> int:
        """Return the bytes of a candidate's weights from their shapes; what it is sized by is made. Raises CopruneError."""
        file = self.folder / "text" / "sizes.json"
        known = noted(file, Sizes, {})
        if candidate.type == EXACT:
            return bytes_in(self._exact(candidate.cut))
        if candidate.key not in known:
            rows, whole = candidate.cut.rows, candidate.of(candidate.cut.sized_by)
            source, asked = self._exact(whole.cut), self._quantisation(whole)
            before = known.get(whole.key) or quantized_bytes(source, asked)
            size = before if rows is None else before - bytes_of_rows(source, asked, rows)
            write_note(file, Sizes(known := known | {whole.key: before, candidate.key: size}))
        return known[candidate.key]

    def _file(self, candidate: Candidate) -> Path:
        name = repr(candidate.cut) if candidate.type == EXACT else candidate.key
        if self.asked.runtime == "transformers":
            return self.folder / "cuts" / _hash(name)
        return self.folder / "files" / f"{_hash(name)}{f'.{EXACT}' if candidate.type == EXACT else ''}.gguf"

    def file(self, candidate: Candidate) -> Path:
        """Return a candidate's file, made if need be. Raises CopruneError where it cannot be."""
        if candidate == AS_GIVEN:
            return self.source.path
        exact = self._exact(candidate.cut)
        if candidate.type == EXACT:
            return exact
        target = self._file(candidate)

        def make() -> None:
            matrix, asked = self._importance(candidate.cut), self._quantisation(candidate)
            self.reporter.say(f"Making {candidate.name}")
            write_note(_sources(target), Sources((exact.name, matrix.name)))
            write_durably(target, lambda path: quantize_beside(self._quants(matrix), exact, path, asked))

        self._once(target, make)
        return target

    def _quantisation(self, candidate: Candidate) -> Quantisation:
        return Quantisation(candidate.type, read_importance(self._importance(candidate.cut)), candidate.embedding)

    def _quants(self, matrix: Path) -> list[Quant]:
        """List the quants that are here with an importance matrix."""
        made = [(file, _sources(file)) for file in sorted((self.folder / "files").glob("*.gguf"))]
        said = [(file, noted(sources, Sources, ("", ""))) for file, sources in made]
        return [Quant(file, file.with_name(exact)) for file, (exact, own) in said if own == matrix.name]

    def drop(self, candidate: Candidate) -> None:
        """Remove a candidate's file, which is not needed any more."""
        if candidate.type not in (EXACT, GIVEN):
            self._file(candidate).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all files and folders of models, and keep what was measured."""
        for name in ("files", "cuts"):
            for file in (self.folder / name).glob("*"):
                if file.is_dir() and file.suffix != _RUN:
                    shutil.rmtree(file)
                elif not file.name.endswith((_RUN, ".seconds.json", ".imatrix.gguf")):
                    file.unlink()

    def _exact(self, cut: Cut) -> Path:
        target = self._file(Candidate(cut, EXACT))
        if self.asked.runtime == "transformers":
            return self._dense_folder(target) if cut == DENSE else self._cut(cut)
        if self._is_in_file(cut):
            return self._cut(cut)

        def make() -> None:
            source = self.asked.model if cut == DENSE else self._cut(cut)
            self.reporter.say(f"Writing {cut.name or 'the dense model'} as {EXACT}")
            export(source, target, like=self.asked.like, type=EXACT, quiet=True)

        self._once(target, make)
        return target

    def _dense_folder(self, target: Path) -> Path:
        """Return the dense model as a folder, in sixteen bits if it is a GGUF file."""
        if isinstance(self.source, ModelFolder):
            return self.source.path

        def make() -> None:
            self.reporter.say("Writing the dense model as a folder")
            model, tokenizer = load_model(self.source, "bfloat16")
            with whole_folder(target) as out, quiet_transformers():
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)

        self._once(target, make)
        return target

    def _importance(self, cut: Cut) -> Path:
        """Return an importance matrix; fewer tokens leave an existing one unchanged."""
        seen = cut if cut.others or cut.tokens else DENSE
        target = self.folder / "files" / f"{_hash(repr(seen))}.imatrix.gguf"

        def make() -> None:
            file, tokenizer = self._exact(seen), self._vocabulary_of(seen)[0]
            ids = encode(tokenizer, "\n".join(self._texts()))["input_ids"]
            found = importance_of(file, str(self.text), self.reporter)
            write_importance(target, {**found, **importance_of_head(file, ids[:_HEAD_TOKENS])})

        self._once(target, make)
        return target

    def _is_in_file(self, cut: Cut) -> bool:
        """Return whether a cut takes nothing but rows of tokens from a GGUF file, where they can be copied."""
        tokens_only = bool(cut.removed) and not cut.others and self.asked.runtime == "llama.cpp"
        return tokens_only and isinstance(self.source, GgufFile)

    def run_of(self, cut: Cut) -> Path:
        """Return the folder of the run that makes a cut."""
        return self.folder / "cuts" / f"{_hash(repr(cut))}{_RUN}"

    def _cut(self, cut: Cut) -> Path:
        """Return a cut as a folder, or as the exact file that it has been made in."""
        in_file, before = self._is_in_file(cut), cut.before
        target = self._file(Candidate(cut, EXACT)) if in_file else self.run_of(cut).with_suffix("")
        if before is not None and before != DENSE:
            base = str(self._cut(before))
        else:
            base = str(self._exact(DENSE)) if in_file or self.asked.runtime == "transformers" else self.asked.model
        kind, more = cut.removed[-1].partition("=")[0], dict[str, Any](remove=cut.removed[-1])
        if cut.tokens:
            more |= {"finetune": "distill", "finetune_tokens": cut.tokens}

        def make() -> None:
            self.reporter.say(f"Removing {cut.name}")
            text = str(self._text_of_cuts())
            if kind == "vocabulary":
                more.update(vocabulary_text=[text, *sources_of("\n".join(self._texts()))], vocabulary_force=True)
            prune(
                base,
                dataset=text,
                nsamples=_SAMPLES,
                seqlen=_SEQLEN,
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

        self._once(target, make)
        return target

    def _once(self, target: Path, make: Callable[[], None]) -> None:
        """Make a file or folder, if it is not there, and note how long that took without what it was made of."""
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.folder / "locks" / f"{target.name}.lock"):
            if target.exists():  # another worker has made it meanwhile
                return
            note = note_of(target)
            with nullcontext() if note.exists() else self._clock.timed(note):  # what is made again was counted before
                make()

    def note_rest(self, counts: bool = True) -> None:
        """Note the time of this process that nothing else has noted; or leave it out, where workers noted it."""
        rest, note = self._clock.rest(), self.folder / "text" / "rest.seconds.json"
        if counts:
            note_seconds(note, seconds_in(note) + rest)

    @property
    def text(self) -> Path:
        """The seen half's text and more, a document a row."""
        return self.folder / "text" / "text.jsonl"

    def _texts(self) -> list[str]:
        return [passage.text for passage in read_passages(self.text)]

    def _text_of_cuts(self) -> Path:
        """Return the text that cuts are made and trained with: not that of the items that judge first."""
        file = self.text.with_name("cuts.jsonl")
        write_passages(file, [passage for passage in read_passages(self.text) if not passage.judging])
        return file

    def _answers(self, task: Task) -> Path:
        return self.folder / "text" / f"answers-{task.key[:16]}.safetensors"

    def _answered(self, task: Task) -> DenseAnswers:
        file = self._answers(task)
        return DenseAnswers.load(file) if file.exists() else DenseAnswers()

    def answer(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Generate the dense model's answers to prompts that have none yet. wanted: places of items by task."""
        for task in [*self.asked.tasks, *self.asked.writing]:
            file, places = self._answers(task), wanted.get(task.name, ())
            if task.kind not in ("prompts", "writing") or not places:
                continue
            exact = self.file(Candidate(DENSE, EXACT))
            with claimed(self.folder / "locks" / f"{file.name}.lock"):
                found = self._answered(task)
                missing = [place for place in places if item_key(task, place) not in found.ids]
                if not missing:
                    continue
                with self._clock.timed(note_of(file)):
                    reader = self.reader(exact, DENSE)
                    bar = self.reporter.bar("The dense model's answers", len(missing))
                    with bar as advance, self._pace(task, missing):
                        for place in missing:
                            found.add(reader, task, place)
                            advance(1)
                    reader.engine.close()
                    found.save(file)

    @contextmanager
    def _pace(self, task: Task, places: Sequence[int]) -> Iterator[None]:
        """Keep the seconds of an item of a task, without opening the model."""
        started = time.perf_counter()
        yield
        if places:
            self.paces[task.key] = self.paces.get(task.key, 0.0) + (time.perf_counter() - started) / len(places)

    def collect(self, tasks: Sequence[Task], seconds: float) -> None:
        """Collect the text of the seen half, and more. Raises CopruneError.

        tasks: with the items that are used. seconds: for the text of the model's own.
        """
        self._once(self.text, lambda: self._collect(tasks, seconds))

    def _collect(self, tasks: Sequence[Task], seconds: float) -> None:
        answers = {key: ids for task in tasks for key, ids in self._answered(task).ids.items()}

        def of(task: Task, place: int) -> str:
            item = task.items[place]
            right = item.answer or self.tokenizer.decode(
                answers.get(item_key(task, place), []), skip_special_tokens=True
            )
            return item.asked if item.text else f"{item.asked} {right}".strip()

        own = [of(task, place) for task in tasks for place in task.seen[len(task.seen) // 2 :]]
        passages, line = calibration_of(tasks, of, self._more_text(sum(map(len, own)), seconds))
        if line:
            self.reporter.say(line)
        write_passages(self.text, passages)

    def _more_text(self, characters: int, seconds: float) -> list[str]:
        """Return the user's text, or text of the model's own. characters: that there are already. seconds: for the latter."""
        if self.asked.text is not None:
            from coprune.data import calibration_windows

            windows = calibration_windows(self.asked.text, self.tokenizer, 2 * _SAMPLES, _SEQLEN, self.asked.seed)
            return [str(self.tokenizer.decode(one, skip_special_tokens=True)) for one in windows.tokens]
        count = own_count(characters, int(seconds * self.known(Candidate(DENSE, EXACT)).speed))
        if not count:
            self.reporter.say("The items of the seen half calibrate alone: the budget leaves no time for other text")
            return []
        self.reporter.say(f"The dense model writes {count} texts of its own, to be calibrated on")
        reader = self.reader(self.file(Candidate(DENSE, EXACT)), DENSE)
        found = own_texts(reader, count, self.asked.seed, self.reporter)
        reader.engine.close()
        return found


def _lacks_memory(error: CopruneError) -> bool:
    return isinstance(error, OutOfMemory) or error.field == "check_memory"


def _sources(file: Path) -> Path:
    """Return the file with the names of what a quant was made of."""
    return file.with_name(f"{file.name}.sources.json")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
