"""Files named by the user: pipes are refused at once instead of waited for, and duplicate YAML keys are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.base.files import open_given
from coprune.base.validation import read_yaml
from coprune.data.local_text import rows_of
from coprune.model.checkpoint.locate import locate
from coprune.recipe.recipe import Recipe
from coprune.removal.expert_choice import ExpertScores
from support.pico_folder import save_pico
from support.task_items import read_task


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.jsonl", open_given),
        ("x.jsonl", rows_of),
        ("x.jsonl.gz", rows_of),
        ("x.parquet", rows_of),
        ("x.jsonl", lambda file: read_task(str(file))),
        ("x.yaml", lambda file: read_yaml(file, "the recipe", "recipe")),
        ("x.json", ExpertScores.read),
    ],
)
@pytest.mark.timeout(20)
def test_a_pipe_is_refused_at_once(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadInput, match=f"{name} is a pipe or a device"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "merges.txt", "model-00002-of-00002.safetensors"])
@pytest.mark.timeout(20)
def test_a_model_folder_with_a_pipe_is_refused_at_once(name: str, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", num_hidden_layers=1)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(BadInput, match=f"{name} is a pipe or a device"):
        locate(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: a\nprune: {}\nmodel: b\n", "model is given twice, the second time in line 3"),
        ("prune:\n  sparsity: 0.5\n  sparsity: 0.6\n", "sparsity is given twice, the second time in line 3"),
        ("a: [{b: 1, 'b': 2}]", "b is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(BadInput, match=told):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_different_mappings_and_aliases_may_have_equal_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {b: 1}\nc: *x\nd: {b: 2, 1: 3, '1': 4}\n")
    assert read_yaml(tmp_path / "a.yaml", "the file", "recipe")["c"] == {"b": 1}


def test_a_row_of_megabytes_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"a{number}", "answer": "b"} for number in range(20)]
    rows.append({"messages": [{"role": "user", "content": "a " * 10**6}]})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=r"row 21, has 2,000,004 characters, and an item has at most 500,000"):
        read_task(str(tmp_path / "items.jsonl"))
