"""The model card, the plot of a matrix, and pushing to the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from huggingface_hub.utils._paths import filter_repo_objects

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.model.checkpoint.origin import Origin, origin_of
from coprune.recipe.recipe import make_recipe
from coprune.report.card import model_card
from coprune.report.run_page import run_page
from coprune.report.runs_page import Run, _reached
from coprune.report.schema import Report
from support.commands import run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save_pico, write_words
from support.reports import with_tasks


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("card")
    return save_pico(folder / "model"), write_words(folder / "text.txt")


def test_the_cards_metadata_has_the_results(files: tuple[Path, Path]) -> None:
    model, text = files
    settings: dict[str, Any] = {
        "dataset": str(text),
        "eval_data": str(text),
        "seqlen": 32,
        "nsamples": 2,
        "quiet": True,
    }
    report: Report = with_tasks(coprune.prune(str(model), "magnitude", **settings).report)
    card = model_card(report)
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "pruning" in header["tags"]
    results = header["model-index"][0]["results"]
    values = [metric["value"] for result in results for metric in result["metrics"]]
    assert values == [pytest.approx(report.perplexity[0].pruned, abs=1e-4), 0.5, 0.5]
    assert "| piqa (version 1.0, 0-shot) | acc | 100 | 60.00 ± 5.00 % | 50.00 ± 5.00 % | -10.00 ± 2.00 % |" in card
    assert f"{report.perplexity[0].pruned:.2f}" in card


def test_the_card_names_base_licence_bytes_and_where_it_loads(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    shutil.copytree(files[0], source)
    header = "---\nlicense: other\nlicense_name: mine\nlicense_link: [1]\nbase_model:\n- someone/base\n---\n# Model\n"
    (source / "README.md").write_text(header)
    settings: dict[str, Any] = {"dataset": str(files[1]), "eval_data": str(files[1]), "seqlen": 32, "nsamples": 2}
    coprune.prune(str(source), "magnitude", save_model=saved, quiet=True, **settings)
    card = (saved / "README.md").read_text()
    told = yaml.safe_load(card.split("---")[1])
    assert {name: told.get(name) for name in ("base_model", "license", "license_name", "license_link")} == {
        "base_model": "someone/base",
        "license": "other",
        "license_name": "mine",
        "license_link": None,
    }
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert f"The weights take {size:,} bytes. The model loads in transformers. " in card
    assert "with the same parts removed load in vLLM" in card
    assert "For llama.cpp and Ollama" in card
    (source / "README.md").write_text("---\n[: no YAML\n---\n")
    assert origin_of(str(source)) == Origin()
    (source / "config.json").write_text(json.dumps({"_name_or_path": "someone/else"}))
    assert origin_of(str(source)).base_model == "someone/else"


def test_a_plot_shows_the_dense_models_matrix(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vl_convert")
    from coprune.stages.plot_matrix import matrix_distributions

    model, text = files
    name = "model.layers.1.mlp.down_proj"
    command = ["inspect", str(model), "--plot", name, "--dataset", str(text), "--nsamples", "2", "--seqlen", "32", "-q"]
    for suffix, start in ((".svg", b"<svg"), (".png", b"\x89PNG")):
        file = tmp_path / f"plot{suffix}"
        ended = run_command([*command, "-o", str(file)], monkeypatch, capsys)
        assert ended.code == 0, ended.err
        assert file.read_bytes().startswith(start)
    recipe = make_recipe({"model": str(model), "dataset": str(text), "nsamples": 2, "seqlen": 32})
    found = matrix_distributions(recipe, name, Reporter(quiet=True))
    weight = pico_model("llama").get_parameter(f"{name}.weight")
    inputs: list[torch.Tensor] = []
    dense = pico_model("llama")
    dense.get_submodule(name).register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    from coprune.data.windows import calibration_windows

    dense(calibration_windows(str(text), pico_tokenizer(), 2, 32, 0).tokens)
    norm = inputs[0].reshape(-1, weight.shape[1]).square().mean(dim=0).sqrt()
    assert found.norm is not None
    assert found.score is not None
    assert found.norm.high == pytest.approx(float(norm.max().log10()), abs=1e-4)
    assert found.score.high == pytest.approx(float((weight.abs() * norm).max().log10()), abs=1e-4)
    assert sum(found.score.kept) == sum(found.score.pruned) == weight.numel() // 2
    ended = run_command([*command, "-o", "plot.pdf"], monkeypatch, capsys)
    assert "a .png or .svg file" in ended.err
    several = ["inspect", str(model), "--plot", "*.q_proj", "--dataset", str(text), "-q"]
    assert "matches 3 matrices" in run_command(several, monkeypatch, capsys).err


def test_pushing_needs_a_saved_model_and_a_login(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="save_model=…"):
        make_recipe({"model": "m", "push_to_hub": "me/model"})
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("coprune.report.hub_upload.get_token", lambda: None)
    with pytest.raises(BadInput, match="hf auth login"):
        coprune.prune(str(files[0]), save_model=tmp_path / "pruned", push_to_hub="me/model", quiet=True)
    assert not (tmp_path / "pruned").exists()


def test_a_push_that_fails_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coprune.report.hub_upload import push

    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("coprune.report.hub_upload.get_token", lambda: "token")
    with pytest.raises(BadInput, match="hf upload me/model"):
        push(tmp_path, "me/model")
    assert (tmp_path / "model.safetensors").exists()


class Hub:
    """A stand-in for the Hub that records uploads."""

    private = False

    def __init__(self) -> None:
        self.files: list[str] = []

    def create_repo(self, repository: str, exist_ok: bool, private: bool | None) -> Any:
        assert exist_ok
        return RepoUrl(f"https://huggingface.co/{repository}")

    def repo_info(self, repository: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, folder_path: Path, repo_id: str, allow_patterns: list[str], commit_message: str) -> None:
        files = [str(path.relative_to(folder_path)) for path in sorted(folder_path.rglob("*")) if path.is_file()]
        self.files += [f"{repo_id}/{name}" for name in filter_repo_objects(files, allow_patterns=allow_patterns)]


def test_a_folder_or_the_model_of_a_run_is_pushed(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr("coprune.report.hub_upload.HfApi", lambda: hub)
    monkeypatch.setattr("coprune.report.hub_upload.get_token", lambda: "token")
    settings: dict[str, Any] = dict(evaluate=False, dataset=str(files[1]), seqlen=32, nsamples=2, layer_error=False)
    coprune.prune(
        str(files[0]), "magnitude", **settings, quiet=True, save=tmp_path / "run", save_model=tmp_path / "model"
    )
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "model" / "link.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / "odd[1].txt").write_text("odd")
    ended = run_command(["push", str(tmp_path / "run"), "me/model", "-q"], monkeypatch, capsys)
    assert (ended.code, ended.out.splitlines()[0]) == (0, "pushed to https://huggingface.co/me/model")
    names = {name.removeprefix("me/model/") for name in hub.files}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "odd[1].txt"}
    assert "link.txt" not in names
    hub.files = []
    ended = run_command(["push", str(tmp_path / "model"), "me/model", "--private"], monkeypatch, capsys)
    assert ended.err.splitlines()[-1] == (
        "coprune: me/model exists and is public; name another one, or leave out --private."
    )
    assert (ended.code, hub.files) == (2, [])
    hub.private = True
    assert coprune.push(tmp_path / "model", "me/model", private=True) == "https://huggingface.co/me/model"
    ended = run_command(["push", str(tmp_path), "me/model"], monkeypatch, capsys)
    assert f"{tmp_path} holds no model; name the folder of a saved model." in ended.err


def test_cards_contain_no_local_paths(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = files
    spaced = tmp_path / "my own texts" / "a.txt"
    spaced.parent.mkdir()
    spaced.write_text(text.read_text())
    settings: dict[str, Any] = dict(seqlen=32, nsamples=2, quiet=True, save_model=tmp_path / "a b" / "pruned")
    report = coprune.prune(str(model), "magnitude", dataset=str(spaced), eval_data=str(text), **settings).report
    card = (tmp_path / "a b" / "pruned" / "README.md").read_text()
    size = sum(file.stat().st_size for file in (tmp_path / "a b" / "pruned").glob("*.safetensors"))
    assert card == model_card(report, size)
    for place in (tmp_path, model.parent, "my own texts", "a b/"):
        assert str(place) not in card
    assert "# model, pruned with magnitude" in card
    assert "base_model" not in card
    assert "| text.txt | 32 |" in card
    assert "dataset: a.txt" in card
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in card


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("my models/big one (final)/", "big one (final)"),
        ("SmolLM2 Q4_1 (2).gguf", "SmolLM2 Q4_1 (2).gguf"),
        ("HuggingFaceTB/SmolLM2 (SmolLM2.Q4_1.gguf)", "SmolLM2"),
    ],
)
def test_cards_and_pages_use_a_models_full_name(
    source: str, name: str, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = files
    monkeypatch.chdir(tmp_path)
    Path("my models/big one (final)").mkdir(parents=True)
    settings: dict[str, Any] = {"dataset": str(text), "eval_data": str(text), "eval_tokens": 64, "seqlen": 32}
    report: Report = coprune.prune(str(model), "magnitude", nsamples=2, quiet=True, **settings).report
    report = report.model_copy(update={"model": report.model.model_copy(update={"source": source})})
    card = model_card(report)
    header = yaml.safe_load(card.split("\n---\n")[0])
    assert header["model-index"][0]["name"] == f"{name}-magnitude"
    assert header.get("base_model") == ("HuggingFaceTB/SmolLM2" if source.startswith("HuggingFaceTB") else None)
    assert (f"# {name}, pruned" in card) == ("base_model" not in header)
    assert f"<h1>{name}, pruned with magnitude</h1>" in run_page(report)
    (one, _) = _reached(Run("run", report, None), 1, 2.0, 1.0)
    assert one.name == f"dense {name}"


def test_foreign_names_stay_plain_text_in_the_card(files: tuple[Path, Path]) -> None:
    model, text = files
    settings: dict[str, Any] = {"evaluate": False, "dataset": str(text), "seqlen": 32, "nsamples": 2, "quiet": True}
    report: Report = coprune.prune(str(model), "magnitude", **settings).report
    source = "owner/name:\tx\nlicense:\tmit\n---\n#\tmine"
    facts = report.model.model_copy(update={"source": source})
    recipe = report.recipe.replaced(cache_dir="```\n\n# mine\n\n```")
    card = model_card(report.model_copy(update={"model": facts, "recipe": recipe}))
    header = yaml.safe_load(card.split("\n---\n")[0])
    assert header["base_model"] == source
    assert "license" not in header
    assert not any(line.startswith(("# mine", "license", "```\n")) for line in card.splitlines())


def test_a_run_killed_while_writing_its_page_is_finished_with_the_page(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """A stand-in for SIGKILL, which nothing in coprune catches."""

    def killed(*_: Any) -> None:
        raise Killed

    def page(runs: list[Path], path: Path) -> None:
        assert Report.read(runs[0] if runs[0].is_file() else runs[0] / "report.json")
        path.write_text("page")

    settings: dict[str, Any] = {"evaluate": False, "quiet": True, "save": tmp_path / "run", "layer_error": False}
    with monkeypatch.context() as patch:
        patch.setattr("coprune.report.run_folder.write_page", killed)
        with pytest.raises(Killed):
            coprune.prune(str(files[0]), "magnitude", **settings)
    assert not (tmp_path / "run" / "report.json").exists()  # it would mark the run as finished
    monkeypatch.setattr("coprune.report.run_folder.write_page", page)
    coprune.prune(str(files[0]), "magnitude", **settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.json", "report.html", "log_magnitude.txt"}
    assert not (tmp_path / "run" / ".report.json").exists()
