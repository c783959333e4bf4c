"""What bench measures is on the page of the run whose folder holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import coprune
from support.commands import run_command
from support.pico_folder import save_pico, write_words

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
from coprune.base.errors import BadInput
from coprune.report.several import report_page
from coprune.report.speed import speed_sections


def test_bench_puts_its_figures_into_the_page_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coprune.packed.bench.measure_bandwidth", lambda **_: 1e9)
    text = str(write_words(tmp_path / "text.txt"))
    settings: dict[str, Any] = {"dataset": text, "eval_data": text, "seqlen": 32, "nsamples": 2, "quiet": True}
    run, model = tmp_path / "run", tmp_path / "pruned"
    coprune.prune(str(save_pico(tmp_path / "model")), "magnitude", save=run, save_model=model, **settings)
    assert "Speed and memory" not in (run / "report.html").read_text()
    assert speed_sections(run) == []

    options = ["--prompt", "4", "--tokens", "2", "--repeats", "2", "--batches", "1,2"]
    arguments = ["bench", str(model), "--json", str(run / "bench.json"), *options]
    ended = run_command(arguments, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    page = (run / "report.html").read_text()
    assert page == report_page([run])
    (section,) = speed_sections(run)
    assert section in page
    assert section.count("<td>dense</td>") == 1 + 2 * 2  # sizes; two phases, two batch sizes
    assert "<td>packed</td>" in section

    (run / "bench.json").write_text('{"model": "x"}')
    with pytest.raises(BadInput, match=r"bench\.json is not what"):
        report_page([run])
