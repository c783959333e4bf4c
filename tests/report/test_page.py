"""The page in a real browser (no error, no request, every chart drawn, a working picker), and its content."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.evaluation.zero_shot import Estimate
from coprune.recipe.recipe import make_recipe
from coprune.report.card import model_card
from coprune.report.heat_map import matrix_rows, place_of
from coprune.report.provenance import MadeFacts, commit_of
from coprune.report.run_page import run_page
from coprune.report.runs_page import Run, names_apart, runs_page
from coprune.report.schema import Report
from support.browser import find_browser, opened_page
from support.commands import run_command
from support.pico_folder import save_pico, write_words
from support.reports import with_tasks

BEYOND = """[...document.querySelectorAll("main *")].map(one => [one, one.getBoundingClientRect()])
    .filter(([one, box]) => box.width > 0 && (box.right > innerWidth + 1 || box.left < -1)).map(([one]) => one.outerHTML)"""
needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two finished runs of a pico model, one with invented zero-shot results and a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    text = str(write_words(folder / "text.txt"))
    model = str(save_pico(folder / "model"))
    runs = []
    for method, sparsity in (("wanda", 0.5), ("magnitude", 0.25)):
        settings: dict[str, Any] = {
            "dataset": text,
            "eval_data": text,
            "seqlen": 32,
            "nsamples": 4,
            "save": folder / method,
        }
        coprune.prune(model, method, sparsity=sparsity, quiet=True, **settings)
        runs.append(folder / method)
    return runs


@needs_browser
def test_a_runs_page_draws_every_chart_without_error_or_request(runs: list[Path], tmp_path: Path) -> None:
    report = with_tasks(Report.read(runs[0] / "report.json"))
    file = tmp_path / "report.html"
    file.write_text(run_page(report), encoding="utf-8")
    with opened_page() as page:
        page.open(file.as_uri())
        assert page.evaluate("document.documentElement.dataset.ready") == "yes"
        assert page.evaluate("document.querySelectorAll('.track i').length") == 2 + 2 * 2  # one text and two tasks
        assert page.evaluate("document.querySelectorAll('.heat i').length") == len(report.matrices)
        assert page.evaluate("document.querySelectorAll('.histogram rect').length") > 3 * 8
        # A uniform sparsity is a sentence instead of a chart.
        assert "Every pruned matrix is 50.00 % zeros." in page.evaluate("document.body.innerText")
        names = page.evaluate("[...document.querySelectorAll('#matrix option')].map(o => o.text)")
        assert names == [matrix.name for matrix in report.matrices]
        shown = "document.getElementById('matrix-facts').dataset.matrix"
        assert page.evaluate(shown) == names[0]
        before = page.evaluate("document.getElementById('distribution-magnitude').innerHTML")
        page.evaluate("document.getElementById('next').click()")
        page.wait(f"{shown} === {json.dumps(names[1])}")
        page.wait("document.getElementById('distribution-magnitude').innerHTML !== " + json.dumps(before))
        page.evaluate(
            "{ const s = document.getElementById('matrix'); s.value = '4'; s.dispatchEvent(new Event('change')) }"
        )
        page.wait(f"{shown} === {json.dumps(names[4])}")
        assert f"{100 * report.matrices[4].sparsity:.2f} %" in page.evaluate(
            "document.getElementById('matrix-facts').textContent"
        )
        # On a phone in dark mode nothing scrolls sideways or is clipped.
        page.open(file.as_uri(), width=360, dark=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate(BEYOND) == []
        page.open(file.as_uri() + "#matrix=" + names[2])
        page.call("Page.reload")
        page.wait(f"document.getElementById('matrix-facts')?.dataset.matrix === {json.dumps(names[2])}")
        page.open(file.as_uri() + "#matrix=%")  # an invalid percent escape
        page.call("Page.reload")
        page.wait(f"document.getElementById('matrix-facts')?.dataset.matrix === {json.dumps(names[0])}")
        assert page.errors == []
        assert {url.partition("#")[0] for url in page.requests} == {file.as_uri()}


@needs_browser
def test_a_page_of_several_runs_compares_them(runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "runs.html"
    file.write_text(runs_page([Run.read(run) for run in runs]), encoding="utf-8")
    with opened_page() as page:
        page.open(file.as_uri())
        assert page.evaluate("document.documentElement.dataset.ready") == "yes"
        assert page.evaluate("document.querySelectorAll('.area .dot').length") == 3
        assert page.evaluate("getComputedStyle(document.querySelector('path.front')).strokeDasharray") == "4px, 3px"
        text = page.evaluate("document.body.innerText")
        for run in runs:
            assert f"{Report.read(run / 'report.json').perplexity[0].pruned:.2f}" in text
        for width in (1200, 360):
            page.open(file.as_uri(), width=width)
            assert page.evaluate(BEYOND) == []
        assert page.errors == []
        assert set(page.requests) == {file.as_uri()}


def test_runs_are_named_by_the_differing_parts_of_their_folders(runs: list[Path]) -> None:
    assert names_apart(runs) == ["wanda", "magnitude"]
    assert names_apart([Path("out/a/2-4/wanda"), Path("out/a/4-8/wanda")]) == ["2-4/wanda", "4-8/wanda"]
    assert names_apart([Path("x/a/2-4/wanda"), Path("x/b/2-4/wanda"), Path("x/b/2-4/ria")])[0] == "a/2-4/wanda"
    assert names_apart([runs[0], runs[0] / "report.json"]) == ["wanda", "wanda"]  # the same run twice


def test_a_page_shows_date_machine_and_command(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = Report.read(runs[0] / "report.json")
    assert report.made is not None
    assert report.made.command is None  # called from Python
    assert f"{report.made.date:%Y-%m-%d %H:%M} UTC, on " in run_page(report)
    for program in ("/usr/bin/coprune", "/src/coprune/__main__.py"):
        monkeypatch.setattr("sys.argv", [program, "prune", "a model", "--quiet"])
        made = MadeFacts.here()
        assert made.command == "coprune prune 'a model' --quiet"
    said = made.model_copy(update={"command": "coprune prune <b>", "commit": "0123abcd"})
    page = run_page(report.model_copy(update={"made": said}))
    assert '<pre id="command"><span>coprune</span> <span>prune</span> <span>&lt;b&gt;</span></pre>' in page
    assert f", with coprune {made.version} (commit 0123abcd)</p>" in page
    assert made.commit == commit_of(Path(coprune.__file__).parents[2])  # None for an installed package
    assert commit_of(Path(__file__).parents[2]) != ""
    assert commit_of(tmp_path) is None


def test_uniform_sparsity_is_one_sentence_on_the_page(runs: list[Path]) -> None:
    report = Report.read(runs[0] / "report.json")
    assert "Every pruned matrix is 50.00 % zeros." in run_page(report)
    first, *others = report.matrices
    uneven = report.model_copy(update={"matrices": [first.model_copy(update={"sparsity": 0.6}), *others]})
    assert "Sparsity per block and kind of matrix" in run_page(uneven)
    removal = make_recipe({"model": "model", "remove": "channels=0.25"})
    assert ">Sparsity" not in run_page(uneven.model_copy(update={"recipe": removal}))


def test_every_text_has_a_chart(runs: list[Path]) -> None:
    found = []
    for run in runs:
        one = Run.read(run)
        other = one.report.perplexity[0].model_copy(update={"data": "another text", "fingerprint": "other"})
        report = one.report.model_copy(update={"perplexity": [*one.report.perplexity, other]})
        found.append(Run(one.name, report, one.size))
    page = runs_page(found)
    for name in (found[0].report.perplexity[0].data, "another text"):
        chart = page[page.index(f"Perplexity on {name} against sparsity") :].partition("</section>")[0]
        assert "Sequence length 32, 2 of 2 runs; lower is better." in chart
        assert chart.count('<i class="dot s') == 3 + 3  # both runs and the dense model, and the legend
    for one in found:
        bars = run_page(one.report)
        for name in (one.report.perplexity[0].data, "another text"):
            assert f'<div class="of">{name}</div><span class="tag dense">dense</span>' in bars


def test_every_run_writes_its_page_and_report_rebuilds_it(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert "pruned with wanda" in page
    ended = run_command(["report", str(runs[0]), "-o", str(tmp_path / "again.html")], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    ended = run_command(["report", *map(str, runs), "-o", str(tmp_path / "both.html")], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert "2 runs" in (tmp_path / "both.html").read_text(encoding="utf-8")
    ended = run_command(["report", str(tmp_path)], monkeypatch, capsys)
    assert ended.code == 2
    assert "holds no report.json; name the folder of a finished run" in ended.err


def test_text_in_a_page_cannot_close_an_html_element(runs: list[Path]) -> None:
    page = run_page(with_tasks(Report.read(runs[0] / "report.json")))
    assert "</script><b>" not in page
    assert "<b>event</b>" not in page
    assert page.count("</script>") == 2


def test_names_are_split_into_block_and_kind(runs: list[Path]) -> None:
    assert place_of("model.layers.3.self_attn.q_proj") == ("3", "self_attn.q_proj")
    assert place_of("model.layers.12.mlp.experts.up_proj[7]") == ("12", "mlp.experts.up_proj[*]")
    assert place_of("model.layers.1.mlp.experts.5.w1") == ("1", "mlp.experts.*.w1")
    assert place_of("lm_head") == ("–", "lm_head")
    stages = ["net.stages.1.downsample", "net.stages.1.blocks.0", "net.stages.1.blocks.10"]
    assert place_of("net.stages.1.blocks.10.mlp.fc1", stages) == ("1.10", "mlp.fc1")
    assert place_of("net.stages.1.downsample.1", stages) == ("1", "downsample.*")
    assert place_of("model.layers.1.mlp.experts.5.w1", ["model.layers.1"]) == ("1", "mlp.experts.*.w1")
    assert place_of("net.stem.0", stages) == ("–", "net.stem.*")
    report = Report.read(runs[0] / "report.json")
    rows = matrix_rows(report.matrices)
    assert len(rows) == len(report.matrices)
    assert {row["block"] for row in rows} == {"0", "1", "2"}


def test_a_tasks_perplexity_is_not_shown_as_a_share(runs: list[Path]) -> None:
    report = with_tasks(Report.read(runs[0] / "report.json"))
    assert report.zero_shot is not None
    words = {"word_perplexity": Estimate(value=42.5, stderr=None)}
    lines = report.zero_shot.tasks[0].model_copy(
        update={"task": "wikitext", "dense": None, "delta": None, "pruned": words}
    )
    facts = report.zero_shot.model_copy(update={"tasks": (*report.zero_shot.tasks, lines)})
    report = report.model_copy(update={"zero_shot": facts})
    page = run_page(report)
    row = re.sub("<[^>]*>", " ", page[page.index("word_perplexity") :])
    assert row.split()[:4] == ["word_perplexity", "–", "42.50", "–"]
    assert '<div class="of">piqa</div>' in page
    assert '<div class="of">wikitext</div>' not in page, "bars end at 100 %"
    assert "| wikitext (version 1.0, 0-shot) | word_perplexity | 100 | – | 42.50 | – |" in model_card(report)
