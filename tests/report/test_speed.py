"""What bench measures is on the page of the run whose folder holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import coprune
from coprune.base.errors import BadInput
from coprune.packed.bench import Bench
from coprune.packed.timing import Timing
from coprune.report.several import report_page, speed_sections
from support.commands import run_command
from support.pico_folder import save_pico, write_words


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
    assert section.count(">dense</td>") == 1 + 2 * 2  # sizes; two phases, two batch sizes
    assert ">packed</td>" in section

    (run / "bench.json").write_text('{"model": "x"}')
    with pytest.raises(BadInput, match=r"bench\.json is not what"):
        report_page([run])


def test_several_models_are_shown_each_with_its_own_baseline(tmp_path: Path) -> None:
    found = Bench("a, b", "a CPU", 2, "llama.cpp f16", "AVX-512", 1e9, bytes={"a in x": 200, "b in x": 150})
    found.baselines, found.files = dict.fromkeys(found.bytes, "a in x"), {"a in x": 210, "b in x": 160}
    found.add("decode", 1, 1, {"a in x": Timing(0.2, 0.1, 0.3), "b in x": Timing(0.15, 0.1, 0.2)})
    (tmp_path / "bench.json").write_text(json.dumps(found.to_dict()))
    (section,) = speed_sections(tmp_path)
    for shown in ("of the first in the same runtime", ">0.750</td>", ">1.33 ×</td>", "MB on the disk"):
        assert shown in section
