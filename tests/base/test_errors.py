"""Errors are values, worded for Python or the command line, and nothing is lost on the way to another process."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base import errors
from coprune.base.errors import BadInput, CopruneError, NumericalError, unknown_name
from coprune.base.words import Command, LeaveOut, Set, Setting, say, speaking
from coprune.recipe.flags import CommandLine

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CopruneError)]

# Words, and their wording in Python and on the command line.
SAID = [
    ("as it is", "as it is", "as it is"),
    (Setting("save_model"), "save_model=…", "--save-model"),
    (Setting("check_memory"), "check_memory=…", "--check-memory"),
    (Set("stream", True), "stream=True", "--stream"),
    (Set("stream", False), "stream=False", "--no-stream"),
    (Set("evaluate", False), "evaluate=False", "--no-eval"),
    (Set("permute", True), "permute=True", "--permute"),
    (Set("batch_size", 1), "batch_size=1", "--batch-size 1"),
    (Set("save", ...), "save=…", "--save …"),
    (Set("save", Path("out/my run")), "save='out/my run'", "--save 'out/my run'"),
    (Set("exclude", "*.q_proj"), "exclude='*.q_proj'", "--exclude '*.q_proj'"),
    (LeaveOut("stream"), "leave out stream", "leave out --stream"),
    (LeaveOut("top_k"), "leave out top_k", "leave out --top-k"),
    (
        Command("evaluate", "FOLDER", Set("tasks", ...)),
        "coprune.evaluate(folder, tasks=…)",
        "coprune eval FOLDER --tasks …",
    ),
    (Command("export", Path("a b"), "TARGET"), "coprune.export('a b', target)", "coprune export 'a b' TARGET"),
    (("give ", Set("pattern", "2:4"), " or ", Setting("sparsity")), "give pattern='2:4' or sparsity=…", None),
]


@pytest.mark.parametrize(("words", "python", "command"), SAID)
def test_messages_name_settings_as_python_or_the_command_line_does(
    words: Any, python: str, command: str | None
) -> None:
    assert say(words) == python
    assert command is None or say(words, CommandLine()) == command


def test_the_active_interface_words_errors_only_within_its_context() -> None:
    error = BadInput("two at once", fix=LeaveOut("stream"))
    with speaking(CommandLine()):
        assert str(error) == "two at once; leave out --stream."
    assert str(error) == "two at once; leave out stream."
    with pytest.raises(ZeroDivisionError), speaking(CommandLine()):
        raise ZeroDivisionError
    assert str(error) == "two at once; leave out stream."


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BadInput("it is wrong"), "it is wrong."),
        (BadInput("it is wrong."), "it is wrong."),
        (BadInput("it is wrong", fix="mend it"), "it is wrong; mend it."),
        (BadInput("it is wrong", fix="Nothing was written"), "it is wrong. Nothing was written."),
        (BadInput("it is wrong", fix=("try ", Setting("save"))), "it is wrong; try save=…"),
        (BadInput((Set("top_k", 9), " is too many")), "top_k=9 is too many."),
    ],
)
def test_an_error_prints_its_cause_and_fix_as_sentences(error: CopruneError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_public_documented_and_survives_pickling(kind: type[CopruneError]) -> None:
    assert getattr(coprune, kind.__name__) is kind
    assert kind.__name__ in (inspect.getdoc(errors) or "")
    error = kind(("x ", Set("stream", True)), field="stream", value=True, fix=LeaveOut("stream"))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.cause, again.field, again.value, again.fix) == (error.cause, error.field, error.value, error.fix)
    assert str(again) == str(error)
    assert again.text(CommandLine()) == error.text(CommandLine()) == "x --stream; leave out --stream."


def test_long_file_contents_are_quoted_only_in_part() -> None:
    text = str(BadInput("no number: " + "x" * 100_000, fix="see 'here'"))
    assert len(text) < 1100
    assert text.startswith("no number: xxx")
    assert text.endswith("; see 'here'.")


def test_bad_input_alone_is_a_value_error() -> None:
    kinds: list[type[Exception]] = [kind for kind in KINDS if issubclass(kind, ValueError)]
    assert kinds == [BadInput]


def test_context_is_prepended_to_an_error_and_the_rest_is_kept() -> None:
    error = NumericalError("the scores hold NaN", field="dtype", value="float16", fix=("try ", Set("dtype", "float32")))
    placed = error.within("layer 3").within("run a")
    assert isinstance(placed, NumericalError)
    assert placed.text(CommandLine()) == "run a: layer 3: the scores hold NaN; try --dtype float32."
    assert (placed.field, placed.value, placed.fix) == ("dtype", "float16", error.fix)


def test_an_unknown_name_suggests_the_nearest_one() -> None:
    near, far = (unknown_name("method", name, ["wanda", "ria"], field="method") for name in ("wandaa", "foo"))
    assert str(near) == "unknown method 'wandaa'; did you mean 'wanda'? Known: ria, wanda."
    assert str(far) == "unknown method 'foo'. Known: ria, wanda."
    assert (far.field, far.value) == ("method", "foo")
