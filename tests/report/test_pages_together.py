"""Pages of a run, a fine-tuning, a sweep and a comparison: linked, small for any model, with a chart per text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import coprune
from coprune.evaluation.comparison_table import Comparison
from coprune.pruning.solver_events import Event
from coprune.recipe.views import training_recipe
from coprune.report.comparison_page import comparison_page
from coprune.report.heat_map import place_of
from coprune.report.links import link_back
from coprune.report.plot import Axis
from coprune.report.provenance import MadeFacts
from coprune.report.run_events import OfMatrix
from coprune.report.run_page import picker_data, run_page, shown_matrices
from coprune.report.schema import Report
from coprune.sweeps.sweep_page import write_sweep_page
from coprune.training.finetune_page import finetune_page, write_finetune_page
from coprune.training.finetune_report import FinetuneReport, HeldOutPoint, LossPoint, PerplexityChange
from support.browser import find_browser, opened_page
from support.commands import run_command
from support.pico_folder import save_pico, write_words

MOST = 400_000
MADE = MadeFacts.here().model_copy(update={"command": "coprune finetune x", "commit": "abc123"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep of two runs, one with a name that URLs must escape."""
    folder = tmp_path_factory.mktemp("pages")
    text, model = str(write_words(folder / "text.txt")), str(save_pico(folder / "model"))
    for method, name in (("wanda", "wanda"), ("magnitude", "mag nitude")):
        settings: dict[str, Any] = {"dataset": text, "eval_data": text, "seqlen": 32, "nsamples": 2, "quiet": True}
        coprune.prune(model, method, save=folder / "sweep" / name, save_model=folder / name, **settings)
    (folder / "sweep" / "mag nitude").rename(folder / "sweep" / "magnitude")
    lines = [
        f"model: {model}",
        f"dataset: {text}",
        "method: [wanda, magnitude]",
        "seqlen: 32",
        f"save: {folder / 'sweep'}",
    ]
    (folder / "sweep" / "sweep.yaml").write_text("\n".join(lines))
    write_sweep_page(folder / "sweep")
    return folder


def tuned(model: Path, steps: int = 900) -> FinetuneReport:
    """Return a fine-tuning with two texts."""
    change = PerplexityChange(data="first", source="a file", seqlen=32, before=40.0, after=20.0)
    curve = [
        LossPoint(step=i, seconds=i, loss=3 + 1 / i, learning_rate=1e-4, gradient_norm=1.0) for i in range(1, steps)
    ]
    return FinetuneReport(
        settings=training_recipe({"model": str(model), "dataset": "embedded", "minutes": 1.0}),
        source="<b>words</b>",
        windows=10,
        block_size=32,
        fingerprint="0",
        processes=1,
        trained_parameters=1000,
        pruned_matrices=4,
        patterns={"2:4": 4},
        sparsity_before=0.5,
        sparsity_after=0.5,
        masks="0",
        steps=steps,
        seconds=60.0,
        curve=curve,
        held_out=[HeldOutPoint(step=step, seconds=step, loss=3.1) for step in (1, 500)],
        perplexity=[change, change.model_copy(update={"data": "second", "after": 30.0})],
        adapter=None,
        saved_model=None,
        versions={"torch": "2"},
        made=MADE,
    )


def links_in(page: Path) -> list[Path]:
    """Return the targets of a page's links."""
    found = re.findall(r'<a href="([^"]+)"', page.read_text(encoding="utf-8"))
    return [(page.parent / unquote(address)).resolve() for address in found]


def test_the_pages_of_a_sweep_and_its_runs_link_to_each_other(place: Path) -> None:
    sweep, runs = (
        place / "sweep" / "report.html",
        [place / "sweep" / name / "report.html" for name in ("wanda", "magnitude")],
    )
    assert links_in(sweep) == [run.resolve() for run in runs]
    for run in runs:
        assert links_in(run) == [sweep.resolve()]
        assert run.read_text().count("The sweep sweep") == 1
        link_back(run, sweep, "The sweep sweep")
        assert run.read_text().count("The sweep sweep") == 1
    page = re.sub("</?span>", "", sweep.read_text())
    assert f"coprune sweep {place / 'sweep' / 'sweep.yaml'}</pre>" in page
    assert f"coprune prune {place / 'model'}" in page  # the commands of its runs
    assert len(page.encode()) < MOST


def test_links_lead_only_to_existing_pages(place: Path, tmp_path: Path) -> None:
    alone = tmp_path / "run"
    alone.mkdir()
    (alone / "report.json").write_bytes((place / "sweep" / "wanda" / "report.json").read_bytes())
    assert "<nav></nav>" in coprune_report(alone, alone / "report.html")
    (alone / "train").mkdir()
    (alone / "train" / "finetune.json").write_text(tuned(place / "wanda").model_dump_json())
    write_finetune_page(alone / "train")
    assert links_in(alone / "train" / "report.html") == [(alone / "report.html").resolve()]
    elsewhere = tmp_path / "other pages" / "run.html"
    elsewhere.parent.mkdir()
    coprune_report(alone, elsewhere)
    assert links_in(elsewhere) == [(alone / "train" / "report.html").resolve()]


def coprune_report(run: Path, page: Path) -> str:
    from coprune.report.run_folder import write_page

    write_page([run], page)
    return page.read_text()


def test_the_page_of_a_fine_tuning_has_its_curves_and_texts(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "finetune.json").write_text(tuned(place / "wanda").model_dump_json())
    ended = run_command(["report", str(tmp_path)], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    page = (tmp_path / "report.html").read_text()
    for name, after in (("first", "20.00"), ("second", "30.00")):
        group = page[page.index(f'<div class="of">{name}, sequence length 32</div>') :].partition(
            '<div class="group">'
        )[0]
        assert ">40.00</span>" in group
        assert f">{after}</span>" in group
    for shown in ("training loss", "loss on held-out samples", "learning rate", "gradient norm", "(commit abc123)"):
        assert shown in page
    assert "<span>finetune</span> <span>x</span></pre>" in page
    assert "<b>words</b>" not in page
    assert page.count("L") < 2500  # curves are averaged to a displayable length
    assert len(page.encode()) < MOST
    (tmp_path / "finetune.json").write_text("{}")
    ended = run_command(["report", str(tmp_path)], monkeypatch, capsys)
    assert ended.code == 2
    assert "is not a report" in ended.err


def test_a_page_of_a_comparison_is_written_with_links_to_the_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs, text, page = (
        [str(place / "sweep" / name) for name in ("wanda", "magnitude")],
        place / "text.txt",
        tmp_path / "c.html",
    )
    again = tmp_path / "again.txt"
    again.write_text(text.read_text()[:4000])
    asked = ["--data", f"{text},{again}", "--seqlen", "32", "--fresh", "--quiet", "--page", str(page)]
    kept = tmp_path / "c.json"
    ended = run_command(["compare", str(place / "model"), *runs, *asked, "--json", str(kept)], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert f"page      {page}" in ended.out
    written, found = page.read_text(), Comparison.model_validate_json(kept.read_text())
    assert links_in(page) == [Path(run, "report.html").resolve() for run in runs]
    for index in (0, 1):
        for row in found.rows:
            assert f'<span class="value">{row.evaluation.perplexity[index].value:.2f}</span>' in written
    assert written.count("against sparsity") == 2  # both texts
    assert len(written.encode()) < MOST
    assert MADE.line().rpartition(" (commit")[0].partition(" UTC")[2] in written
    assert "against sparsity" not in comparison_page(Comparison(rows=found.rows[:2]))


@pytest.mark.parametrize(("blocks", "experts"), [(126, 0), (48, 32)])
def test_pages_of_large_models_are_small(place: Path, blocks: int, experts: int) -> None:
    report = Report.read(place / "sweep" / "wanda" / "report.json")
    one = next(matrix for matrix in report.matrices if matrix.distributions is not None)
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    kinds += [f"mlp.experts.{e}.{k}_proj" for e in range(experts) for k in ("gate", "up", "down")]
    kinds += [] if experts else [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    matrices = [
        one.model_copy(
            update={
                "name": f"model.layers.{block}.{kind}",
                "sparsity": 0.5 + block / 500,
                "relative_layer_error": 0.1 + block / 1000 + (".7." in kind),
            }
        )
        for block in range(blocks)
        for kind in kinds
    ]
    names = [f"model.layers.{block}" for block in range(blocks)]
    model = report.model.model_copy(update={"block_names": names})
    events = [OfMatrix(matrix=matrix.name, event=Event(kind="no tokens")) for matrix in matrices]
    page = run_page(report.model_copy(update={"matrices": matrices, "model": model, "events": events}))
    assert len(page.encode()) < MOST
    chosen = shown_matrices(matrices, names)
    assert 200 < len(chosen) <= 600
    assert {place_of(matrix.name)[1] for matrix in chosen} == {place_of(matrix.name)[1] for matrix in matrices}
    assert f"{len(chosen):,} of the {len(matrices):,} matrices are shown" in page
    # Only the worst expert of each block is shown.
    assert all(".7." in matrix.name for matrix in chosen if "experts" in matrix.name)


def test_histogram_bins_are_proportional_digits(place: Path) -> None:
    matrix = next(m for m in Report.read(place / "sweep" / "wanda" / "report.json").matrices if m.distributions)
    assert matrix.distributions.magnitude is not None
    data = picker_data([matrix], [])
    low, _, top, kept, pruned = data["matrices"][0][6]["magnitude"]
    counts = matrix.distributions.magnitude
    assert low == pytest.approx(counts.low, abs=1e-3)
    steps = len(data["digits"]) - 1
    assert top == max(a + b for a, b in zip(counts.kept, counts.pruned, strict=True))
    for digits, exact in ((kept, counts.kept), (pruned, counts.pruned)):
        read = [data["digits"].index(digit) / steps * top for digit in digits]
        assert read == pytest.approx(exact, abs=top / steps)
        assert [one > 0 for one in read] == [one > 0 for one in exact]


def test_axes_fit_their_values() -> None:
    axis = Axis.of("", [20.0, 90.0], str, ratios=True)
    assert 15 < axis.low < 20 < 90 < axis.high < 110
    assert len(axis.ticks) >= 3
    assert all(axis.low <= tick <= axis.high for tick, _ in axis.ticks)
    assert axis.at(20 * 4.5**0.5) == pytest.approx(50)
    for values in ([0.5, 0.5], [0.0, 0.5], [1e9, 2e9], [3.0], [-1.0, 1.0], [1e-4, 1.1e-4]):
        axis = Axis.of("", values, str)
        assert axis.low <= min(values) <= max(values) <= axis.high
        assert 2 <= len(axis.ticks) <= 12
        assert (axis.low >= 0) == (min(values) >= 0)


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
def test_fine_tuning_and_sweep_pages_fit_every_width(place: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned.html").write_text(finetune_page(tuned(place / "wanda")), encoding="utf-8")
    cut = """[...document.querySelectorAll("main *")].map(one => [one, one.getBoundingClientRect()])
        .filter(([one, box]) => box.width > 0 && (box.right > innerWidth + 1 || box.left < -1)).map(([one]) => one.outerHTML)"""
    with opened_page() as page:
        for file in (tmp_path / "tuned.html", place / "sweep" / "report.html"):
            for width in (1200, 390):
                page.open(file.as_uri(), width=width, dark=width == 390)
                assert page.evaluate("document.documentElement.dataset.ready") == "yes"
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate(cut) == []
                assert page.evaluate("[...document.querySelectorAll('.area')].every(a => a.clientWidth > 200)")
        assert page.errors == []
