"""The page of a classifier's run: accuracy, and images with changed predictions."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import coprune
from coprune.data.images import LabelledImages, labelled_images
from coprune.report.card import model_card
from coprune.report.heat_map import matrix_rows
from coprune.report.run_page import run_page
from coprune.report.runs_page import Run, runs_page
from coprune.report.schema import Report
from coprune.run.report_facts import class_name, thumbnail
from coprune.run.trackers import final_figures
from support.browser import find_browser, opened_page
from support.pico_images import save_classifier

SHOWN = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that changes many predictions."""
    folder = tmp_path_factory.mktemp("run")
    source = save_classifier("convnext", folder / "dense")
    settings: dict[str, Any] = {
        "sparsity": 0.9,
        "dataset": "digits",
        "nsamples": 4,
        "eval_images": 100,
        "save": folder / "run",
    }
    coprune.prune(source, "magnitude", quiet=True, **settings)
    return folder / "run"


def test_the_report_keeps_the_first_images_that_changed(run: Path) -> None:
    (found,) = Report.read(run / "report.json").accuracy
    assert (found.changed or 0) > 20
    assert len(found.examples) == 20
    assert [example.thumbnail is not None for example in found.examples] == [True] * SHOWN + [False] * 8
    evaluated = labelled_images("digits", "evaluation").first(100)
    for example in found.examples[:SHOWN]:
        assert example.dense != example.pruned
        assert example.label == int(evaluated.labels[example.image])
        # The model only numbers its classes, so names come from the images.
        assert example.names == tuple(str(number) for number in (example.label, example.dense, example.pruned))
        data = base64.b64decode(example.thumbnail.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).tobytes() == evaluated.image(example.image).tobytes()


def test_blocks_of_stages_have_separate_rows(run: Path) -> None:
    report = Report.read(run / "report.json")
    rows = matrix_rows(report.matrices, report.model.block_names)
    assert len(rows) == len(report.matrices)
    assert {"1", "1.0", "1.1"} <= {row["block"] for row in rows}


def test_the_page_shows_changed_images_with_both_models_classes(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    report = Report.read(run / "report.json")
    (found,) = report.accuracy
    assert f"{100 * (found.dense_top1 or 0):.2f} →</span> {100 * found.pruned_top1:.2f} %" in page
    assert f'<td data-of="changed class">{found.changed}</td>' in page
    figures = re.findall(r'<figure><img src="(data:image/png;base64,[^"]+)".*?</figure>', page)
    assert figures == [example.thumbnail for example in found.examples[:SHOWN]]
    named = found.examples[0].model_copy(update={"names": ("<b>cat</b>", "dog", "</script>")})
    nasty = found.model_copy(update={"examples": [named, *found.examples[1:]], "data": '"><script>'})
    page = run_page(report.model_copy(update={"accuracy": [nasty]}))
    assert "<b>&lt;b&gt;cat&lt;/b&gt;</b>" in page
    assert '"><script>' not in page


def test_a_report_without_thumbnails_or_dense_model_makes_a_page(run: Path) -> None:
    report = Report.read(run / "report.json")
    (found,) = report.accuracy
    bare: dict[str, Any] = {
        "dense_top1": None,
        "dense_top1_interval": None,
        "dense_top5": None,
        "changed": None,
        "examples": [],
    }
    page = run_page(report.model_copy(update={"accuracy": [found.model_copy(update=bare)]}))
    assert "<figure>" not in page
    assert f"{100 * found.pruned_top1:.2f} [" in page


def test_accuracy_is_shown_in_pages_tables_and_cards(run: Path) -> None:
    report = Report.read(run / "report.json")
    (found,) = report.accuracy
    page = runs_page([Run.read(run, "one"), Run("two", report.model_copy(update={"accuracy": []}), None)])
    assert "<th>top-1 % digits (100)</th>" in page
    assert f'<td data-of="top-1 % digits (100)">{100 * found.pruned_top1:.2f}</td>' in page
    assert "Top-1 accuracy on digits against sparsity" in page
    figures = final_figures(report)
    assert figures["top1/digits"] == found.pruned_top1
    assert figures["top1_dense/digits"] == found.dense_top1
    results = yaml.safe_load(model_card(report).split("---")[1])["model-index"][0]["results"]
    assert [one["metrics"][0]["value"] for one in results] == [pytest.approx(found.pruned_top1)]


def test_a_photograph_becomes_a_small_jpeg() -> None:
    uri = thumbnail(Image.effect_noise((600, 300), 40).convert("RGB"))
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (112, 56)
    assert len(data) < 10_000


def test_class_names_are_the_models_if_it_has_any() -> None:
    import torch

    images = LabelledImages(lambda i: None, torch.zeros(1), ("n01", "n02"), "")
    assert class_name(1, images, {0: "tench", 1: "goldfish"}) == "goldfish"
    assert class_name(1, images, {0: "LABEL_0", 1: "LABEL_1"}) == "n02"
    assert class_name(2, images, None) == "class 2"


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
def test_the_images_are_drawn_in_a_browser_and_fit_a_phone(run: Path) -> None:
    with opened_page() as page:
        page.open((run / "report.html").as_uri(), width=360, dark=True)
        assert page.evaluate("document.documentElement.dataset.ready") == "yes"
        drawn = "[...document.querySelectorAll('figure img')].filter(i => i.complete && i.naturalWidth === 8).length"
        assert page.evaluate(drawn) == SHOWN
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.errors == []
