"""Golden figures: every run's results are unchanged, to the last bit under the same arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest

from golden.arithmetic import arithmetic
from golden.compare import BY, Golden
from golden.measure import Workbench, has_real_model, needs_real_model
from golden.rows import PICO, Row, all_rows

ROWS = all_rows()


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("golden"))


def marked(row: Row) -> Any:
    return pytest.param(row, id=row.name.replace(" ", "-"), marks=[pytest.mark.slow] if row.slow else [])


@pytest.mark.parametrize("row", [marked(row) for row in ROWS.values()])
def test_figures_match_the_golden_file(row: Row, golden: Golden, bench: Workbench) -> None:
    if needs_real_model(row) and not has_real_model():
        pytest.skip("the packages with the real model and text are not installed")
    different = golden.differences(row.name, bench.measure(row))
    assert not different, f"{row.name} ({golden.regime(row.name)}): {'; '.join(different)}"


def test_golden_figures_and_runs_match_one_to_one(golden: Golden) -> None:
    assert golden.rows.keys() == ROWS.keys()


@pytest.mark.parametrize("family", PICO)
def test_a_folder_gives_the_same_streamed_and_loaded(family: str, golden: Golden) -> None:
    names = [f"{family} +{how} sparsegpt 2:4" for how in ("streamed", "loaded")]
    streamed, loaded = (golden.rows[name] for name in names)
    assert (streamed["masks"], streamed["weights"]) == (loaded["masks"], loaded["weights"])


def test_golden_comparison_is_exact_where_arithmetic_is_the_same(golden: Golden) -> None:
    name = "llama wanda 50% block"
    changed = dict(golden.rows[name], perplexity=[math.nextafter(p, 0) for p in golden.rows[name]["perplexity"]])
    assert bool(golden.differences(name, changed)) == golden.exact(name)
    worse = dict(golden.rows[name], error=[2 * error for error in golden.rows[name]["error"]])
    assert golden.differences(name, worse)
    assert golden.differences(name, {"refused": "no"})
    assert golden.differences("llama of nowhere", changed)


def by_another_arithmetic(golden: Golden, name: str) -> tuple[Golden, Any]:
    figures = golden.rows[name]
    elsewhere = {"elsewhere": {**arithmetic(), "operations": "others"}}
    return Golden(elsewhere, {name: {**figures, BY: "elsewhere"}}), figures


def test_sparsity_counts_under_another_arithmetic_unless_it_is_searched(golden: Golden) -> None:
    for name, less, same in (
        ("gpt2 wanda_variant 50% sequential", 0.0002, True),
        ("gpt2 wanda_variant 50% sequential", 0.0011, False),
        ("gpt2 wanda 50% sequential", 0.0002, False),
    ):
        elsewhere, figures = by_another_arithmetic(golden, name)
        found = {**figures, "sparsity": figures["sparsity"] - less}
        assert bool(elsewhere.differences(name, found)) != same


def test_perplexities_count_in_nats_under_another_arithmetic(golden: Golden) -> None:
    for name, factor, same in (
        ("smollm2-blocks ablate_mag_iter 2:4 sequential", 0.72, True),
        ("smollm2-blocks ablate_mag_iter 2:4 sequential", 0.66, False),
        ("llama wanda 50% block", 0.92, True),
        ("llama wanda 50% block", 0.88, False),
    ):
        elsewhere, figures = by_another_arithmetic(golden, name)
        found = {**figures, "perplexity": [factor * one for one in figures["perplexity"]]}
        assert bool(elsewhere.differences(name, found)) != same


def test_rows_made_here_are_exact_and_other_rows_stay(golden: Golden) -> None:
    name, other = "llama wanda 50% block", "llama wanda 2:4 block"
    figures = {key: value for key, value in golden.rows[name].items() if key != "by"}
    made = golden.with_rows({name: figures})
    assert made.exact(name)
    assert made.rows[other] == golden.rows[other]
    assert not made.differences(name, figures)
    assert made.differences(name, dict(figures, masks="0"))
