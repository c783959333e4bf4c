"""Requirements on answers: parsing, and comparison with figures."""

from __future__ import annotations

import pytest

from coprune.base.errors import BadInput
from coprune.recipe.answers import read_conditions
from coprune.recipe.recipe import make_recipe


def test_conditions_are_parsed() -> None:
    loops, kl, ended, sampled = read_conditions("loops<=dense+1, kl<0.5,ended >= dense - 2.5,sampled.tokens>1e1,")
    assert (loops.name, loops.sign, loops.number, loops.against_dense) == ("loops", "<=", 1.0, True)
    assert (kl.name, kl.number, kl.against_dense, kl.needs_dense) == ("kl", 0.5, False, True)
    assert (ended.sign, ended.number, ended.against_dense) == (">=", -2.5, True)
    assert (sampled.name, sampled.sampled, sampled.number, sampled.needs_dense) == ("tokens", True, 10.0, False)
    assert read_conditions(None) == ()


@pytest.mark.parametrize(
    ("text", "figure", "dense", "holds"),
    [
        ("loops<=dense+1", 3, 2, True),
        ("loops<=dense+1", 4, 2, False),
        ("loops<dense", 2, 2, False),
        ("ended>=dense-1", 2, 3, True),
        ("loops<=dense+1e1,", 12, 2, True),
        ("loops<=dense+1e1", 13, 2, False),
        ("tokens>10", 10, None, False),
        ("kl<.5", 0.49, None, True),
        ("perplexity<=dense*1.05", 10.5, 10, True),
        ("perplexity <= dense * 1.05", 10.6, 10, False),
    ],
)
def test_conditions_compare_a_figure_with_its_bound(text: str, figure: float, dense: float | None, holds: bool) -> None:
    (condition,) = read_conditions(text)
    assert condition.holds(figure, dense) == holds


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "kl<1,,loops<1",
        "loops",
        "loops<=",
        "loops=3",
        "loops<=wanda",
        "loops<=dense/2",
        "lops<3",
        "kl<dense",
        "overlap>=dense-0.1",
        "sampled.accuracy>0.5",
        "beam.loops<3",
    ],
)
def test_invalid_conditions_are_refused_before_anything_runs(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        make_recipe({"model": "m", "require": text})
    assert caught.value.field == "require"


def test_conditions_on_sampled_answers_need_sampling() -> None:
    with pytest.raises(BadInput) as caught:
        make_recipe({"model": "m", "generate": "p", "generate_temperature": 0, "require": "sampled.loops<=3"})
    assert str(caught.value) == (
        "sampled.loops<=3 is about sampled answers, and with generate_temperature=0.0 none are sampled; "
        "leave out generate_temperature."
    )
