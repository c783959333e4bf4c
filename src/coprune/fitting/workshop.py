"""The folder in which candidates are made and measured: each product once, stored by its inputs, so that a killed fit resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock
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
from coprune.fitting.calibration import calibration_of, read_passages, write_passages
from coprune.fitting.candidates import DENSE, EXACT, Candidate, Cut
from coprune.fitting.made import bytes_in, note_of, seconds_in, seconds_of
from coprune.fitting.notes import Asked, Measured, differing
from coprune.fitting.reader import Reader
from coprune.fitting.score import DenseAnswers, item_key, score_item
from coprune.fitting.tasks import Task
from coprune.gguf_files.importance import importance_of, importance_of_head, read_importance, write_importance
from coprune.gguf_files.llama_cpp import Quantisation, quantized_bytes
from coprune.gguf_files.reuse import Quant, bytes_of_rows, quantize_beside
from coprune.model.checkpoint.load import load_model, load_tokenizer, quiet_transformers
from coprune.model.checkpoint.locate import GgufFile, Location, ModelFolder, locate
from coprune.steps.call import prune
from coprune.steps.export import export
from coprune.steps.trim import tokens_kept
from coprune.steps.write_text import generate
from coprune.vocabulary.counts import sources_of

_OWN_TEXTS, _OWN_TOKENS = 16, 256
_SAMPLES, _SEQLEN = 16, 256
"""Of what statistics are measured on."""
_HEAD_TOKENS = 512
"""That the head's inputs are measured on."""
VERDICTS_FILE = "verdicts.json"
"""What the unseen half has judged."""
_CHARACTERS = 1200
"""Of the text that memory and speed are measured with."""
_MEMORY_TOKENS, _CONTEXT, _SPEED_TOKENS, _FIRST_ANSWERS = 128, 2048, 24, 8
_RUN = ".run"
_VERDICTS = (BadInput, UnsupportedModel, NumericalError, VerificationError, BrokenMask)
"""Errors that are properties of a candidate and are stored; a full disk or a lost process is not."""


class Workshop:
    """Makes and measures candidates in a folder."""

    def __init__(self, folder: Path, asked: Asked, reporter: Reporter) -> None:
        """Open a folder of measurements. Raises BadInput if it belongs to another fit."""
        self.folder, self.asked, self.reporter = folder, asked, reporter
        self._noted = 0.0  # seconds that this process has accounted for
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
        (folder / "locks").mkdir(exist_ok=True)

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

    def took(self, candidate: Candidate) -> float:
        """Return the seconds of making and measuring a candidate, without its cut."""
        return self.known(candidate).seconds + seconds_of(self._file(candidate))

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
        return load_tokenizer(self._source)

    @cached_property
    def _source(self) -> Location:
        return locate(self.asked.model)  # which reads a GGUF file's vocabulary

    def known(self, candidate: Candidate) -> Measured:
        """Return the stored measurements of a candidate, or why it cannot be made now."""
        if candidate in self._passing:
            return self._passing[candidate]
        file = self._results(candidate)
        return Measured.model_validate_json(file.read_text(encoding="utf-8")) if file.exists() else Measured()

    def measure(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]]) -> Measured:
        """Make a candidate, if it is not there, and measure what is missing of it. wanted: places of items by task."""
        found = self.known(candidate)
        tasks = [*self.asked.tasks, *self.asked.writing]
        missing = {task.name: found.missing(task, wanted.get(task.name, ())) for task in tasks}
        if found.refused or (found.bytes and not any(missing.values())):
            return found
        started, noted = time.perf_counter(), self._noted
        try:
            file = self.file(candidate)
            asked = [one for one in (self._prompts, self.asked.writing) if any(missing[task.name] for task in one)]
            answers = {one[0].kind: self._answers(one) for one in asked}
        except CopruneError as error:
            refused = found.model_copy(update={"refused": str(error)})
            if _lacks_memory(error):  # of this machine now, where the search ends without it
                self._passing[candidate] = refused
            elif isinstance(error, _VERDICTS) and not isinstance(error.__cause__, OSError):
                self._keep(candidate, refused, started, noted)
            else:
                raise
            return self.known(candidate)
        reader = self.reader(file, candidate.cut)
        if not found.bytes:
            found = found.model_copy(update=self._first_figures(file, reader))
        scores = {name: {metric: dict(own) for metric, own in one.items()} for name, one in found.scores.items()}
        with self.reporter.bar(candidate.name, sum(map(len, missing.values()))) as advance:
            for task in tasks:
                own = scores.setdefault(task.key, {})
                for place in missing[task.name]:
                    for metric, value in score_item(reader, task, place, answers.get(task.kind)).items():
                        own.setdefault(metric, {})[place] = value
                    advance(1)
        reader.engine.close()
        self._keep(candidate, found.model_copy(update={"scores": scores}), started, noted)
        return self.known(candidate)

    def _keep(self, candidate: Candidate, found: Measured, started: float, noted: float) -> None:
        """Write what was measured. noted: seconds accounted for when it began; what was made on the way counts by itself."""
        file = self._results(candidate)
        seconds = found.seconds + time.perf_counter() - started - (self._noted - noted)
        self._noted += seconds - found.seconds
        write_text(file, found.model_copy(update={"seconds": seconds}).model_dump_json())
        write_text(file.with_suffix(".seconds.json"), json.dumps({"seconds": seconds}))

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
        known: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if candidate.type == EXACT:
            return bytes_in(self._exact(candidate.cut))
        if candidate.key not in known:
            rows, whole = candidate.cut.rows, candidate.of(candidate.cut.sized_by)
            source, asked = self._exact(whole.cut), self._quantisation(whole)
            before = known.get(whole.key) or quantized_bytes(source, asked)
            size = before if rows is None else before - bytes_of_rows(source, asked, rows)
            write_text(file, json.dumps(known := known | {whole.key: before, candidate.key: size}))
        return known[candidate.key]

    def _file(self, candidate: Candidate) -> Path:
        name = repr(candidate.cut) if candidate.type == EXACT else candidate.key
        if self.asked.runtime == "transformers":
            return self.folder / "cuts" / _hash(name)
        return self.folder / "files" / f"{_hash(name)}{f'.{EXACT}' if candidate.type == EXACT else ''}.gguf"

    def file(self, candidate: Candidate) -> Path:
        """Return a candidate's file, made if need be. Raises CopruneError where it cannot be."""
        exact = self._exact(candidate.cut)
        if candidate.type == EXACT:
            return exact
        target = self._file(candidate)

        def make() -> None:
            matrix, asked = self._importance(candidate.cut), self._quantisation(candidate)
            self.reporter.say(f"Making {candidate.name}")
            write_text(_sources(target), json.dumps([exact.name, matrix.name]))
            write_durably(target, lambda path: quantize_beside(self._quants(matrix), exact, path, asked))

        self._once(target, make)
        return target

    def _quantisation(self, candidate: Candidate) -> Quantisation:
        return Quantisation(candidate.type, read_importance(self._importance(candidate.cut)), candidate.embedding)

    def _quants(self, matrix: Path) -> list[Quant]:
        """List the quants that are here with an importance matrix."""
        made = [(file, _sources(file)) for file in sorted((self.folder / "files").glob("*.gguf"))]
        said = [(file, json.loads(sources.read_text(encoding="utf-8"))) for file, sources in made if sources.exists()]
        return [Quant(file, file.with_name(exact)) for file, (exact, own) in said if own == matrix.name]

    def drop(self, candidate: Candidate) -> None:
        """Remove a candidate's file, which is not needed any more."""
        if candidate.type != EXACT:
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
        if isinstance(self._source, ModelFolder):
            return self._source.path

        def make() -> None:
            self.reporter.say("Writing the dense model as a folder")
            model, tokenizer = load_model(self._source, "bfloat16")
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
        return tokens_only and isinstance(self._source, GgufFile)

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
        with FileLock(self.folder / "locks" / f"{target.name}.lock"):
            if target.exists():  # another worker has made it meanwhile
                return
            started, noted = time.perf_counter(), self._noted
            make()
            note = note_of(target)
            if not note.exists():  # what is made a second time, after its first use, was counted then
                took = time.perf_counter() - started - (self._noted - noted)
                self._noted += took
                write_text(note, json.dumps({"seconds": took}))

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

    @property
    def _prompts(self) -> tuple[Task, ...]:
        return tuple(task for task in self.asked.tasks if task.kind == "prompts")

    def _answers(
        self, tasks: Sequence[Task], expect: Callable[[float], None] = lambda seconds: None
    ) -> DenseAnswers | None:
        """Return the dense model's answers to all items of tasks, generated if need be; None without tasks.

        expect: as in `prepare`.
        """
        if not tasks:
            return None
        target = self.folder / "text" / f"{tasks[0].kind}.safetensors"
        asked = [(task, place) for task in tasks for place in task.seen + task.unseen]

        def answer() -> None:
            reader, found = self.reader(self.file(Candidate(DENSE, EXACT)), DENSE), DenseAnswers()
            started = time.perf_counter()
            with self.reporter.bar("The dense model's answers", len(asked)) as advance:
                for number, (task, place) in enumerate(asked, 1):
                    found.add(reader, task, place)
                    advance(1)
                    if number == _FIRST_ANSWERS:
                        expect((time.perf_counter() - started) * len(asked) / number)
            reader.engine.close()
            found.save(target)

        self._once(target, answer)
        return DenseAnswers.load(target)

    def prepare(self, expect: Callable[[float], None]) -> None:
        """Generate the dense model's answers to prompts, and collect the text of the seen half. Raises CopruneError.

        expect: is told, after the first answers, how many seconds all will take.
        """
        self._answers(self._prompts, expect)
        self._once(self.text, self._collect)

    def _collect(self) -> None:
        answers = self._answers(self._prompts) or DenseAnswers()

        def of(task: Task, place: int) -> str:
            item = task.items[place]
            right = item.answer or self.tokenizer.decode(
                answers.ids.get(item_key(task, place), []), skip_special_tokens=True
            )
            return item.asked if item.text else f"{item.asked} {right}".strip()

        passages, line = calibration_of(self.asked.tasks, of, self._more_text())
        if line:
            self.reporter.say(line)
        write_passages(self.text, passages)

    def _more_text(self) -> list[str]:
        if self.asked.text is not None:
            from coprune.data import calibration_windows

            windows = calibration_windows(self.asked.text, self.tokenizer, 2 * _SAMPLES, _SEQLEN, self.asked.seed)
            return [str(self.tokenizer.decode(one, skip_special_tokens=True)) for one in windows.tokens]
        file = self.text.with_name("own.jsonl")
        file.unlink(missing_ok=True)  # of a fit that was killed
        self.reporter.say("The dense model writes text of its own, to be calibrated on")
        model, seed, quiet = self.asked.model, self.asked.seed, self.reporter.quiet
        generate(model, file, samples=_OWN_TEXTS, seqlen=_OWN_TOKENS, seed=seed, quiet=quiet)
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [str(self.tokenizer.decode(row["answer_ids"], skip_special_tokens=True)) for row in rows]


def _lacks_memory(error: CopruneError) -> bool:
    return isinstance(error, OutOfMemory) or error.field == "check_memory"


def _sources(file: Path) -> Path:
    """Return the file with the names of what a quant was made of."""
    return file.with_name(f"{file.name}.sources.json")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
