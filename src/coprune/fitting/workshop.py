"""Measure candidates: each item once, under a content-based key in the user's store, which other fits share."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import RootModel

from coprune.base.child import OutOfTime
from coprune.base.errors import (
    BadInput,
    BrokenMask,
    CopruneError,
    NumericalError,
    OutOfMemory,
    UnsupportedModel,
    VerificationError,
)
from coprune.base.files import write_text
from coprune.base.progress import Reporter
from coprune.fitting.calibration import Passage, calibration_of, own_count, own_texts, texts_in, write_passages
from coprune.fitting.candidates import DENSE, EXACT, FOREIGN, GIVEN, MIXED, Candidate
from coprune.fitting.clock import Mark
from coprune.fitting.fit_notes import Asked, Measured
from coprune.fitting.making import SAMPLES, SEQLEN, Making
from coprune.fitting.reader import Reader
from coprune.fitting.score import DenseAnswers, item_key, score_item
from coprune.fitting.tasks import Task
from coprune.gguf_files.copied_tensors import bytes_of_rows
from coprune.gguf_files.llama_cpp import quantized_bytes
from coprune.gguf_files.types_by_tensor import Losses
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.store.place import Identity, Place
from coprune.store.store import Key, Store, key_of

VERDICTS_FILE = "verdicts.json"
"""File with the verdicts on the unseen half."""
_CHARACTERS = 1200
"""Length of the text used to measure memory and speed."""
_MEMORY_TOKENS, _CONTEXT, _SPEED_TOKENS = 128, 2048, 24
_VERDICTS = (BadInput, UnsupportedModel, NumericalError, VerificationError, BrokenMask)
"""Errors that are properties of a candidate and are stored; a full disk or a lost process is not."""


class Size(RootModel[int]):
    """Bytes of a candidate's weights."""


class Passages(RootModel[list[Passage]]):
    """Calibration text."""


class LossesNote(RootModel[dict[str, dict[str, tuple[int, float]]]]):
    """Bytes and loss of each type for each tensor."""


class Workshop:
    """Makes and measures candidates in a fit's folder."""

    def __init__(self, folder: Path, asked: Asked, reporter: Reporter, began: float | None = None) -> None:
        """Open a fit's folder. Raises BadInput if it belongs to another fit. began: as for a `Clock`."""
        self.folder, self.asked, self.reporter = folder, asked, reporter
        self.store, self.making = Store.of_user(), Making(folder, asked, reporter, began)
        self.paces: dict[str, float] = {}
        """Seconds per item by the task's key, as measured in this process; the budget reads those of the dense model."""
        self._passing: dict[Candidate, Measured] = {}
        place = Place(folder, Identity.of("fit", 1, asked.facts()))
        if differing := place.differing():
            if not self._refused.exists():
                others = " and ".join(f"another {name}" for name, *_ in differing)
                cause = f"{folder.parent} holds a fit with {others}"
                raise BadInput(cause, field="output", value=str(folder.parent), fix="name another folder")
            shutil.rmtree(folder)
        self._refused.unlink(missing_ok=True)
        place.begin()
        (folder / "text").mkdir(exist_ok=True)

    @property
    def _refused(self) -> Path:
        return self.folder / "refused.txt"

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Record an error that occurs before any verdict, so that a fit with corrected tasks may reuse the folder."""
        try:
            yield
        except BadInput as error:
            if not (self.folder / VERDICTS_FILE).exists():
                write_text(self._refused, str(error))
            raise

    @property
    def spent(self) -> float:
        """Seconds of all recorded work of this fit, including that before a kill."""
        return sum(self.making.done.seconds())

    def note_rest(self, counts: bool = True) -> None:
        """Record the unrecorded time of this process, or discard it if workers have recorded it."""
        if counts:
            self.making.note(key_of("rest", 1), self.making.clock.opened)
        else:
            self.making.clock.since(self.making.clock.opened)

    def key(self, step: str, **more: Any) -> Key:
        """Return the key of a result that depends on all tasks."""
        return key_of(step, 1, tasks=self._task_keys, **self.asked.contents, **more)

    def _results(self, candidate: Candidate) -> Key:
        return self.making.key("fit", candidate, tasks=self._task_keys)

    @property
    def _task_keys(self) -> list[str]:
        return [task.key for task in self.asked.every_task]

    def known(self, candidate: Candidate) -> Measured:
        """Return the known measurements of a candidate, or why it cannot be made now."""
        if candidate in self._passing:
            return self._passing[candidate]
        found = self.store.find(self._results(candidate), Measured)  # a damaged one is measured again
        return Measured() if found is None else found.record

    def learn(self, candidate: Candidate, found: Measured) -> None:
        """Store the measurements of a worker, which may have a store of its own."""
        if found != self.known(candidate):
            if found.refused:  # not stored by the worker: its machine lacked memory
                self._passing[candidate] = found
            else:
                self.store.complete(self._results(candidate), found)

    def measure(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]], until: float = math.inf) -> Measured:
        """Make a candidate if needed, and measure its missing items. Raises CopruneError on a temporary failure.

        wanted: indices of items by task. until: deadline in `time.perf_counter()`, after which no item is started; a
        quantisation is interrupted, and the candidate then has no bytes.
        """
        if self.lacks(candidate, wanted):
            with self.store.claim(self._results(candidate)):
                if self.lacks(candidate, wanted):  # another fit may have measured it meanwhile
                    self._measure(candidate, wanted, until)
        return self.known(candidate)

    def lacks(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]]) -> bool:
        """Return whether a candidate still has to be made, or measured on some of these items."""
        found = self.known(candidate)
        return found.unmade or (not found.refused and any(self._missing(found, wanted).values()))

    def _missing(self, found: Measured, wanted: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return the indices of the items without a score, by task."""
        return {task.name: found.missing(task, wanted.get(task.name, ())) for task in self.asked.every_task}

    def _measure(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]], until: float) -> None:
        found, mark = self.known(candidate), self.making.clock.mark()
        missing = self._missing(found, wanted)
        try:
            file = self.making.file(candidate, until)
        except OutOfTime:
            self.making.note(self.making.interrupted(candidate), mark)
            return
        except CopruneError as error:
            refused = found.model_copy(update={"refused": str(error)})
            if _lacks_memory(error):  # not a property of the candidate: the search continues without it
                self._passing[candidate] = refused
            elif isinstance(error, _VERDICTS) and not _of_the_system(error):
                self._keep(candidate, refused, mark)
            else:
                raise
            return
        self.answer(missing)
        reader = self.making.reader(file, candidate.cut)
        if not found.bytes:
            found = found.model_copy(update=self._first_figures(file, reader))
        scores = {name: {metric: dict(own) for metric, own in one.items()} for name, one in found.scores.items()}
        with self.reporter.bar(candidate.name, sum(map(len, missing.values()))) as advance:
            for task in (one for one in self.asked.every_task if missing[one.name]):
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

    def _keep(self, candidate: Candidate, found: Measured, mark: Mark) -> None:
        """Store measurements. mark: their start; files made in between are recorded separately."""
        key, seconds = self._results(candidate), found.seconds + self.making.clock.passed(mark)
        self.store.complete(key, found.model_copy(update={"seconds": seconds}))
        self.making.note(key, mark)

    def _first_figures(self, file: Path, reader: Reader) -> dict[str, float]:
        text = next((task.items[task.seen[0]].asked for task in self.asked.tasks), "A text.")
        ids = (reader.ids(text[:_CHARACTERS]) * _MEMORY_TOKENS)[:_MEMORY_TOKENS]
        reader.engine.forget()
        reader.engine.read(ids)
        memory = reader.engine.bytes + reader.engine.context_bytes * _CONTEXT // _MEMORY_TOKENS
        seconds = []
        for token in ids[:_SPEED_TOKENS]:
            started = time.process_time()  # excludes other processes, although they slow it down
            reader.engine.read([token])
            seconds.append(time.process_time() - started)
        speed = torch.get_num_threads() / min(seconds)
        return {"bytes": bytes_of_weights(file), "memory": memory, "speed": speed}

    def bytes_of(self, candidate: Candidate) -> int:
        """Return the bytes of a candidate's weights from shapes, making the files this needs. Raises CopruneError."""
        if candidate.type == EXACT:
            return bytes_of_weights(self.making.exact(candidate.cut))
        if candidate.type in (FOREIGN, GIVEN):
            return bytes_of_weights(self.making.file(candidate))
        key = self.making.key("fit-size", candidate)
        return self.store.get(key, Size, lambda: Size(self._planned_bytes(candidate))).root

    def losses(self) -> Losses:
        """Return the loss of each type for each tensor, measuring it if needed. Raises CopruneError if that fails."""
        mark = self.making.clock.mark()
        found = self.store.get(self._losses, LossesNote, lambda: LossesNote.model_validate(self.making.losses()))
        self.making.note(self._losses, mark)
        return found.root

    @property
    def knows_losses(self) -> bool:
        """Whether the losses of types were measured before, by this fit or another one."""
        return self.store.find(self._losses, LossesNote) is not None

    @property
    def _losses(self) -> Key:
        return self.making.key("fit-losses", Candidate(DENSE, MIXED))

    def is_sized(self, candidate: Candidate) -> bool:
        """Return whether the bytes of a candidate are known, from this fit or another one."""
        return self.store.find(self.making.key("fit-size", candidate), Size) is not None

    def _planned_bytes(self, candidate: Candidate) -> int:
        whole, rows = candidate.of(candidate.cut.sized_by), candidate.cut.rows
        source, asked = self.making.exact(whole.cut), self.making.quantisation(whole)
        if rows is None:
            return quantized_bytes(source, asked)
        return self.bytes_of(whole) - bytes_of_rows(source, asked, rows)

    def _answers(self, task: Task) -> Path:
        return self.folder / "text" / f"answers-{task.key[:16]}.safetensors"

    def _answered(self, task: Task) -> DenseAnswers:
        file = self._answers(task)
        return DenseAnswers.load(file) if file.exists() else DenseAnswers()

    def answer(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Generate the dense model's missing answers to prompts. wanted: indices of items by task."""
        for task in self.asked.every_task:
            key, places = key_of("answers", 1, task=task.key), wanted.get(task.name, ())
            if task.kind not in ("prompts", "writing") or not places:
                continue
            exact = self.making.file(Candidate(DENSE, EXACT))
            with self.making.done.claim(key):
                found = self._answered(task)
                missing = [place for place in places if item_key(task, place) not in found.ids]
                if not missing:
                    continue
                mark, reader = self.making.clock.mark(), self.making.reader(exact, DENSE)
                bar = self.reporter.bar("The dense model's answers", len(missing))
                with bar as advance, self._pace(task, missing):
                    for place in missing:
                        found.add(reader, task, place)
                        advance(1)
                reader.engine.close()
                found.save(self._answers(task))
                self.making.note(key, mark)

    @contextmanager
    def _pace(self, task: Task, places: Sequence[int]) -> Iterator[None]:
        """Record the seconds per item of a task, without loading the model."""
        started = time.perf_counter()
        yield
        if places:
            self.paces[task.key] = self.paces.get(task.key, 0.0) + (time.perf_counter() - started) / len(places)

    def collect(self, tasks: Sequence[Task], seconds: float) -> None:
        """Write the calibration text: the seen half and other text. Raises CopruneError.

        tasks: with the items to use. seconds: for text written by the model.
        """
        if self.making.text.exists():
            return
        mark, texts = self.making.clock.mark(), texts_in(int(seconds * self.known(Candidate(DENSE, EXACT)).speed))
        halves = [task.fingerprint for task in (*tasks, *self.asked.tasks)]
        key = self.key("fit-text", halves=halves, texts=texts)
        found = self.store.get(key, Passages, lambda: Passages(self._collected(tasks, texts)))
        write_passages(self.making.text, found.root)
        self.making.note(key, mark)

    def _collected(self, tasks: Sequence[Task], texts: int) -> list[Passage]:
        self.answer({task.name: task.seen for task in tasks if task.kind == "prompts"})
        answers = {key: ids for task in tasks for key, ids in self._answered(task).ids.items()}

        def of(task: Task, place: int) -> str:
            item = task.items[place]
            right = item.answer or self.making.tokenizer.decode(
                answers.get(item_key(task, place), []), skip_special_tokens=True
            )
            return item.asked if item.text else f"{item.asked} {right}".strip()

        own = [of(task, place) for task in tasks for place in task.seen[len(task.seen) // 2 :]]
        passages, line = calibration_of(tasks, of, self._more_text(sum(map(len, own)), texts), self.asked.tasks)
        if line:
            self.reporter.say(line)
        return passages

    def _more_text(self, characters: int, texts: int) -> list[str]:
        """Return the user's text or text written by the model. characters: of the seen items; texts: that time allows."""
        if self.asked.text is not None:
            from coprune.data.windows import calibration_windows

            tokenizer = self.making.tokenizer
            windows = calibration_windows(self.asked.text, tokenizer, 2 * SAMPLES, SEQLEN, self.asked.seed)
            return [str(tokenizer.decode(one, skip_special_tokens=True)) for one in windows.tokens]
        count = own_count(characters, texts)
        if not count:
            self.reporter.say("Calibrating on the seen items only: the budget leaves no time to generate text")
            return []
        self.reporter.say(f"The dense model writes {'a text' if count == 1 else f'{count} texts'} for calibration")
        reader = self.making.reader(self.making.file(Candidate(DENSE, EXACT)), DENSE)
        found = own_texts(reader, count, self.asked.seed, self.reporter)
        reader.engine.close()
        return found


def _lacks_memory(error: CopruneError) -> bool:
    return isinstance(error, OutOfMemory) or error.field == "check_memory"


def _of_the_system(error: BaseException | None) -> bool:
    """Return whether an error was caused by the system, such as a full disk or an unreadable file."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False
