"""A killed run resumes and ends with the same bytes and figures as an undisturbed one."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput, CopruneError
from coprune.base.progress import Reporter
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.run.result import Result
from coprune.runner.run_recipe import run_recipe
from support.killing import count_lines, killed_at, killed_when
from support.pico import pico_model
from support.pico_folder import listing, save, save_pico, write_words
from support.pico_pairs import save_pair_model
from support.sample import sampled

pytestmark = pytest.mark.usefixtures("one_thread")

Undisturbed = Callable[[str], tuple[Path, int, int]]
"""From a run's name to its folder, the number of lines it executes, and of those that write."""
Left = Callable[[str], Path]
"""From a run's name to the remains of the killed run."""
WRITING = ("checkpoint", "run/output", "files.py", "run_stages.py", "runner/", "store/", "verification", "report")
# Method, propagation, family, streamed, and further settings.
RUNS: dict[str, tuple[str, str, str, bool, dict[str, Any]]] = {
    "wanda": ("wanda", "block", "llama", True, {}),
    "wanda in memory": ("wanda", "block", "llama", False, {}),
    "sparsegpt": ("sparsegpt", "block", "llama", True, {"pattern": "2:4"}),
    "sparsegpt in memory": ("sparsegpt", "sequential", "llama", False, {"pattern": "2:4"}),
    "alps": ("alps", "sequential", "llama", True, {"pattern": "2:4"}),
    "mixture": ("wanda", "block", "mixtral", True, {"pattern": "2:4"}),
    "mixture in memory": ("sparsegpt", "sequential", "mixtral", False, {}),
    "refined": ("magnitude", "block", "gpt2", True, {"refine": ["refit"]}),
    "reconstructed": ("wanda", "sequential", "llama", True, {"reconstruct": 3}),
    "allocated": ("wanda", "block", "llama", True, {"allocation": "owl", "sparsity": 0.6}),
    # Samples of two lengths, in separate batches.
    "mixed lengths": (
        *("sparsegpt", "sequential", "llama", True),
        {"dataset": "{place}/words.txt:seqlen=9=0.3,{place}/rows.jsonl=0.4,{place}/other.txt:seqlen=24=0.3"},
    ),
    "shared keys and values": ("wanda", "block", "gemma4_text", True, {}),
    "shared weights": ("wanda", "block", "zamba2", True, {}),
    "shared weights, dense": ("sparsegpt", "dense", "zamba2", False, {}),
    "shared weights in memory": ("wanda", "sequential", "zamba2", False, {"reconstruct": 3}),
    "encoder and decoder": ("sparsegpt", "sequential", "T5", True, {}),
    "encoder and decoder in memory": ("wanda", "block", "T5", False, {"dataset": "{place}/pairs.jsonl"}),
    "permuted": ("wanda", "block", "llama", False, {"permute": True, "pattern": "2:4"}),
    "rotated": ("sparsegpt", "sequential", "llama", False, {"rotate": True, "pattern": "2:4"}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the models and texts that every run reads."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "mixtral", "gpt2", "gemma4_text", "zamba2"):
        save_pico(folder / family, family)
    save_pair_model(folder / "T5", "T5")
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=300, seed=1)
    write_words(folder / "other.txt", seed=2)
    words = (folder / "words.txt").read_text().split()
    rows = [" ".join(words[start : start + 30]) for start in range(100, 400, 30)]
    pairs = [{"source": row, "target": " ".join(row.split()[: 9 + at % 3])} for at, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return folder


def recipe_of(name: str, place: Path, out: Path, **changes: Any) -> Recipe:
    method, propagation, family, stream, more = RUNS[name]
    settings = {
        "model": str(place / family),
        "method": method,
        "propagation": propagation,
        "stream": stream,
        "dataset": str(place / "words.txt"),
        "eval_data": str(place / "test.txt"),
        "evaluate_dense": False,
        "nsamples": 6,
        "seqlen": 16,
        "batch_size": 2,
        "save": str(out / "run"),
        "save_model": str(out / "pruned"),
    }
    named = {"dataset": more["dataset"].format(place=place)} if "dataset" in more else {}
    return make_recipe({**settings, **more, **named, **changes})


def run(name: str, place: Path, out: Path, **changes: Any) -> Result:
    return run_recipe(recipe_of(name, place, out, **changes), reporter=Reporter(quiet=True))


def figures(out: Path) -> tuple[Any, Any]:
    """Return the report without times, memory and paths, which may differ between runs of a recipe."""
    report = json.loads((out / "run" / "report.json").read_text())
    for name in (
        "prune_seconds",
        "total_seconds",
        "earlier_seconds",
        "phases",
        "peak_memory_bytes",
        "saved_model",
        "recipe",
        "made",
    ):
        del report[name]
    return _without_seconds(report), json.loads((out / "run" / "distributions.json").read_text())


def _without_seconds(content: Any) -> Any:
    """Return a part of a report without the times of matrices and answers."""
    if isinstance(content, list):
        return [_without_seconds(one) for one in content]
    if isinstance(content, dict):
        return {key: _without_seconds(value) for key, value in content.items() if key != "seconds"}
    return content


def checkpoint(out: Path) -> dict[str, bytes | None]:
    """Return the saved model's files without the card, which has times and is written last, with the model's size."""
    files = listing(out / "pruned").items()
    return {name: content for name, content in files if not name.startswith(("README.md", ".README.md.coprune-"))}


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return for a run of RUNS its undisturbed folder, and the number of lines in total and while writing."""

    @functools.cache
    def get(name: str) -> tuple[Path, int, int]:
        out = tmp_path_factory.mktemp("undisturbed")
        return out, *count_lines(lambda: run(name, place, out), WRITING)

    return get


# A few runs; all of them at more moments are slow tests.
QUICK = ("wanda",)
MOMENTS = sampled(range(20), quick=[[*RUNS].index(name) for name in QUICK])


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bytes(
    seed: int, place: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    name = list(RUNS)[seed % len(RUNS)]
    expected, lines, written = undisturbed(name)
    # Half of the kills are in the few lines that write; otherwise nearly all would be inside the solvers.
    files, count = (WRITING, written) if generator.random() < 0.5 else (("",), lines)

    def is_killed(moment: int) -> bool:
        killed = killed_at(lambda: run(name, place, tmp_path), moment, files)
        if (tmp_path / "pruned").exists():
            assert checkpoint(tmp_path) == checkpoint(expected)
        return killed

    moment = generator.randrange(1, count)
    # The number of lines varies slightly with printing and waiting, so a late moment may be after the end.
    while not is_killed(moment):
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        moment //= 2
    if not (tmp_path / "run" / "report.json").exists():  # the resuming run may be killed as well
        is_killed(generator.randrange(1, count))
    if not (tmp_path / "run" / "report.json").exists():
        run(name, place, tmp_path)
    assert checkpoint(tmp_path) == checkpoint(expected)
    assert figures(tmp_path) == figures(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "run"]
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".gitattributes"]


@pytest.mark.slow
def test_a_run_killed_twice_while_writing_its_page_is_finished(
    place: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    expected, *_ = undisturbed("allocated")

    def half_written() -> bool:
        return bool(list((tmp_path / "run").glob(".report.html.coprune-*")))

    for _ in range(2):
        assert killed_when(lambda: run("allocated", place, tmp_path), half_written, ("base/files.py",))
        assert not (tmp_path / "run" / "report.json").exists()
    run("allocated", place, tmp_path)
    assert figures(tmp_path) == figures(expected)
    assert (tmp_path / "run" / "report.html").is_file()
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".gitattributes"]


@pytest.fixture(scope="module")
def killed(place: Path, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Return for a run of RUNS what a kill leaves after some, but not all, finished blocks."""

    @functools.cache
    def get(name: str) -> Path:
        _, lines, _ = undisturbed(name)
        for tenth in range(3, 10):
            out = tmp_path_factory.mktemp("killed")
            assert killed_at(functools.partial(run, name, place, out), lines * tenth // 10)
            if list(out.glob(".pruned.partial/model-*.json")):
                return out
        raise AssertionError("no such moment was found")

    return get


@pytest.fixture
def half_done(killed: Left, tmp_path: Path) -> Left:
    """Copy a killed run's remains into the test's folder; return its journal, which holds a finished block."""

    def put(name: str) -> Path:
        shutil.copytree(killed(name), tmp_path, dirs_exist_ok=True)
        journal = tmp_path / ".pruned.partial"
        assert list(journal.glob("model-*.json"))
        return journal

    return put


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("wanda", "flipped bit"),
        ("wanda", "cut off"),
        ("wanda", "no note"),
        ("wanda", "garbled note"),
        ("wanda", "empty note"),
        pytest.param("mixture in memory", "flipped bit", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_block_is_repeated(
    name: str,
    damage: str,
    place: Path,
    undisturbed: Undisturbed,
    half_done: Left,
    tmp_path: Path,
) -> None:
    journal = half_done(name)
    part = min(path for path in journal.glob("model-*.safetensors") if path.with_suffix(".json").exists())
    note, content = part.with_suffix(".json"), bytearray(part.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 16
        part.write_bytes(content)
    elif damage == "cut off":
        part.write_bytes(content[:-100])
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text(note.read_text()[:40] if damage == "garbled note" else "")
    run(name, place, tmp_path)
    assert checkpoint(tmp_path) == checkpoint(undisturbed(name)[0])
    assert figures(tmp_path) == figures(undisturbed(name)[0])


def test_a_journal_without_an_identity_is_restarted(
    place: Path, undisturbed: Undisturbed, half_done: Left, tmp_path: Path
) -> None:
    (half_done("wanda") / "place.json").write_text("{")
    run("wanda", place, tmp_path)
    assert checkpoint(tmp_path) == checkpoint(undisturbed("wanda")[0])


def test_a_journal_with_unknown_content_is_refused(place: Path, half_done: Left, tmp_path: Path) -> None:
    (half_done("wanda") / "parts.json").write_text("{")
    with pytest.raises(BadInput, match="remove the folder"):
        run("wanda", place, tmp_path)


def test_finished_blocks_are_not_repeated(
    place: Path, half_done: Left, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = half_done("wanda")
    noted = len(list(journal.glob("model-*.json")))
    done = run_recipe(recipe_of("wanda", place, tmp_path))
    assert f"{noted} of 3 blocks were finished" in capsys.readouterr().err
    found = [matrix.seconds for matrix in done.report.matrices if int(matrix.name.split(".")[2]) < noted]
    assert done.report.earlier_seconds == pytest.approx(sum(found))
    assert f"after {sum(found):.1f} s of choosing weights in a stopped one" in str(done.report)


DIFFERENT: dict[str, dict[str, Any]] = {
    "method": {"method": "magnitude"},
    "sparsity": {"sparsity": 0.6},
    "propagation": {"propagation": "sequential"},
    "seed": {"seed": 1},
    "nsamples": {"nsamples": 5},
    "exclude": {"exclude": ["*.q_proj"]},
    "options": {"options": {"group": "matrix"}},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_journal_of_another_recipe_is_refused(what: str, place: Path, half_done: Left, tmp_path: Path) -> None:
    journal = half_done("wanda")
    before = listing(journal)
    with pytest.raises(BadInput, match=what):
        run("wanda", place, tmp_path, **DIFFERENT[what])
    assert listing(journal) == before


def test_a_journal_of_other_data_is_refused(place: Path, half_done: Left, tmp_path: Path) -> None:
    half_done("wanda")
    text = (place / "words.txt").read_text()
    try:
        shutil.copyfile(place / "other.txt", place / "words.txt")
        with pytest.raises(BadInput, match=r"calibration tokens was .* and is "):
            run("wanda", place, tmp_path)
    finally:
        (place / "words.txt").write_text(text)


@pytest.mark.parametrize("name", ["wanda", "wanda in memory"])
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.2.mlp.down_proj"])
@pytest.mark.parametrize("value", [0, 150])
def test_a_single_changed_weight_between_kill_and_resume_is_noticed(
    value: int, part: str, name: str, place: Path, half_done: Left, tmp_path: Path
) -> None:
    half_done(name)
    model = pico_model("llama")
    model.get_parameter(f"{part}.weight").view(-1)[value] += 1
    other = tmp_path / "other" / "llama"
    save(model, other)
    (place / "llama").rename(place / "own")
    other.rename(place / "llama")
    try:
        with pytest.raises(BadInput, match=r"model weights was .* and is "):
            run(name, place, tmp_path)
    finally:
        (place / "llama").rename(tmp_path / "other" / "llama")
        (place / "own").rename(place / "llama")


def test_evaluation_settings_may_differ_on_resume(
    place: Path, undisturbed: Undisturbed, half_done: Left, tmp_path: Path
) -> None:
    half_done("wanda")
    run("wanda", place, tmp_path, evaluate=False)
    assert checkpoint(tmp_path) == checkpoint(undisturbed("wanda")[0])
    assert not figures(tmp_path)[0]["perplexity"]


@pytest.mark.parametrize("streamed_first", [True, False])
def test_a_streamed_run_may_resume_in_memory_and_vice_versa(
    streamed_first: bool,
    place: Path,
    undisturbed: Undisturbed,
    half_done: Left,
    tmp_path: Path,
) -> None:
    first, then = ("wanda", "wanda in memory") if streamed_first else ("wanda in memory", "wanda")
    half_done(first)
    run(then, place, tmp_path)
    tensors = {n: c for n, c in checkpoint(tmp_path).items() if n.endswith(".safetensors")}
    assert tensors == {n: c for n, c in checkpoint(undisturbed("wanda")[0]).items() if n.endswith(".safetensors")}


@pytest.mark.parametrize(("name", "seed"), [("wanda", 0), ("mixture", 2)])
def test_a_run_resumes_after_a_full_disk(
    name: str,
    seed: int,
    place: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failed write for lack of space is one clear error, and the run resumes once there is space."""
    from coprune.base import files

    writes = random.Random(seed).randrange(1, 6)
    real = files.sync

    def full(path: Path) -> None:
        nonlocal writes
        writes -= 1
        if writes <= 0:
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(CopruneError, match=r"disk is full|No space left"):
        run(name, place, tmp_path)
    assert not (tmp_path / "pruned").exists()
    monkeypatch.setattr(files, "sync", real)
    run(name, place, tmp_path)
    assert checkpoint(tmp_path) == checkpoint(undisturbed(name)[0])
    assert figures(tmp_path) == figures(undisturbed(name)[0])
