"""The default folder's name tells which settings differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprune.base.files import folder_apart

USUAL = Path("out/wanda")


def apart(there: Mapping[str, Mapping[str, Any]], **settings: Any) -> str:
    """Return the folder's name, given the settings of runs in existing folders."""
    found, _ = folder_apart(USUAL, settings, lambda folder: there.get(folder.name))
    assert found.parent == USUAL.parent
    return found.name


def test_the_default_folder_holds_the_first_run_and_its_repetition() -> None:
    assert apart({}, seed=0) == "wanda"
    assert apart({"wanda": {"seed": 0}}, seed=0) == "wanda"


def test_a_run_with_other_settings_gets_a_name_that_says_which() -> None:
    there = {"wanda": {"seed": 0, "data": "wikitext2", "tokens": None, "include": (), "save_model": "not given"}}
    same = dict(there["wanda"])
    assert apart(there, **same | {"seed": 1}) == "wanda-seed-1"
    assert apart(there, **same | {"data": "/home/me/my texts/a b.txt"}) == "wanda-data-my-texts-a-b.txt"
    assert apart(there, **same | {"tokens": 512, "save_model": "given"}) == "wanda-tokens-512"
    assert apart(there, **same | {"save_model": "given"}) == "wanda-save-model"
    assert apart(there, **same | {"include": ("*.q_proj", "*.v_proj")}) == "wanda-include-.q-proj-.v-proj"
    assert apart({"wanda": same | {"tokens": 512}}, **same) == "wanda-no-tokens"
    assert folder_apart(USUAL, same | {"seed": 1, "data": "c4"}, lambda _: None)[1] == []
    assert folder_apart(USUAL, same | {"seed": 1}, lambda folder: there.get(folder.name))[1] == ["seed"]


def test_an_unnamed_folder_is_reused_for_the_same_run_only() -> None:
    there = {"wanda": {"seed": 0}, "wanda-seed-1": {"seed": 1}, "wanda-seed-2": {"seed": 7}, "wanda-seed-2-2": {}}
    assert apart(there, seed=1) == "wanda-seed-1"
    assert apart(there, seed=2) == "wanda-seed-2-3"


def test_folder_names_stay_within_the_length_limit() -> None:
    many = {f"setting_{i}": i for i in range(60)}
    names = {apart({"wanda": {}}, **many | {"setting_59": last}) for last in (1, 2)}
    assert len(names) == 2
    assert all(len(name) < 100 for name in names)
