"""`name:key=value,…` as text: parsed, formatted, and refused with one exact message."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coprune.base.errors import BadInput
from coprune.recipe.choice import Choice, read_named, read_scalar, write_named


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-2", -2),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("true", True),
        ("True", True),
        ("off", False),
        ("null", None),
        ("row", "row"),
        ("'64'", "64"),
        ('"true"', "true"),
        ("[", "["),
        ("{a: 1}", "{a: 1}"),
        ("2020-01-01", "2020-01-01"),
        ("#", "#"),
        ("&a", "&a"),
    ],
)
def test_values_are_parsed_as_typed_scalars(text: str, value: bool | float | str | None) -> None:
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)


def test_options_follow_a_colon() -> None:
    assert read_named("refit") == ("refit", {})
    assert read_named("owl:spread=0.1, threshold=7") == ("owl", {"spread": 0.1, "threshold": 7})
    assert read_named("sparsegpt:block-size=64") == ("sparsegpt", {"block_size": 64})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refit:rounds", "the option 'rounds' of refit has no value; write refit:rounds=VALUE"),
        ("refit:rounds=", "the option 'rounds' of refit has no value; write refit:rounds=VALUE"),
        ("refit:", "'refit:' lacks an option; write refit:OPTION=VALUE"),
        ("refit:rounds=1,,damping=0", "lacks an option"),
        ("refit:=3", "lacks an option"),
        ("refit:max-rounds=1,max_rounds=2", "the option 'max_rounds' of refit is given twice"),
    ],
)
def test_malformed_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_named(text)


names = st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True)
words = st.from_regex(r"[a-z0-9.+-]+|true|null|no", fullmatch=True)
values = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.none(), words, st.text("ab ,='"))


@given(names, st.dictionaries(names, values, max_size=3))
def test_names_with_options_round_trip(name: str, options: dict[str, Any]) -> None:
    found = read_named(write_named(name, options))
    assert found == (name, options)
    assert [type(value) for value in found[1].values()] == [type(value) for value in options.values()]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("refit:rounds", "^the option 'rounds' of refit has no value; write refit:rounds=VALUE.$"),
        ("", "it has no name.$"),
        ({"rounds": 3}, "names nothing: Field required.$"),
        ({"name": "refit", "rounds": [3]}, r"option 'rounds' is one value .*, not \[3\].$"),
        ({"name": "refit", "options": 3}, "its options are a mapping"),
        (3, "names nothing"),
    ],
)
def test_invalid_choices_are_refused(asked: dict[str, Any] | int | str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Choice.of(asked)  # type: ignore[arg-type]


def test_a_choice_is_text_or_a_mapping() -> None:
    asked = Choice(name="refit", options={"rounds": 10})
    assert Choice.of("refit:rounds=10") == asked
    assert Choice.of({"name": "refit", "rounds": 10}) == asked
    assert Choice.of({"name": "refit", "options": {"rounds": 10}}) == asked
    assert asked.model_dump() == {"name": "refit", "rounds": 10}
    assert str(asked) == "refit:rounds=10"
    assert Choice.of("some/of:them.yaml").name == "some/of:them.yaml"
