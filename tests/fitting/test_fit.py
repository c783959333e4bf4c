"""A fit from items to a file in llama.cpp: proven, resumed, made again from its recipe, and refused in one line."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput, CopruneError, LostProcess, OutOfMemory, VerificationError
from coprune.base.progress import Reporter
from coprune.fitting.candidates import DENSE, EXACT, Candidate
from coprune.fitting.fit import WORK_FOLDER, remake
from coprune.fitting.made import digest_of
from coprune.fitting.notes import Asked, Measured
from coprune.fitting.reader import POSITIONS, Reader
from coprune.fitting.recipe import RECIPE_FILE
from coprune.fitting.score import bits_per_byte, score_item
from coprune.fitting.tasks import Item, Task, read_task
from coprune.fitting.workshop import VERDICTS_FILE, Workshop
from coprune.gguf_files.llama_cpp import LlamaCpp, has_llama_cpp
from coprune.model.checkpoint.digest import source_digest
from coprune.model.checkpoint.locate import locate
from support.disturbing import in_child
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import TEXTS, content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
WORDS = "\n".join(TEXTS).split()
WITHOUT = "vocabulary,experts,channels,blocks"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico llama as a GGUF file, text, and prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("fit"), content_of("bytes")
    model = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
    write_pico_gguf(distinct_norms(model), folder / "model.gguf", tokenizer=tokenizer)
    generator = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(generator.sample(WORDS, 60)) for _ in range(60)))
    return folder


@pytest.fixture(scope="module")
def copying(place: Path) -> Path:
    """The same, but it writes its last token again, whatever is cut."""
    model = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    weight.data.mul_(20)
    write_pico_gguf(distinct_norms(model), place / "copying.gguf", tokenizer=content_of("bytes"))
    return place / "copying.gguf"


def tokens() -> int:
    return len(json.loads(content_of("bytes"))["model"]["vocab"])


def how(place: Path, **more: Any) -> dict[str, Any]:
    return {"text": str(place / "text.txt"), "types": "q8_0,q4_0", "quiet": True, "without": WITHOUT} | more


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def found(place: Path) -> Any:
    return coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=place / "small", **how(place)
    )


@pytest.mark.slow
def test_fewer_tokens_and_channels_are_tried_and_made_again(
    place: Path, copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.fitting.search._DISTILLED", (1024, 2048))
    settings = how(place, without="experts,blocks", types="q8_0", budget="24h")
    found = coprune.fit(copying, place / "text.txt", "bits<=dense*2.5", output=tmp_path / "small", **settings)
    assert found.kept
    assert [line.partition(":")[0] for line in found.lines[1:]] == ["still writes", "still writes"]
    assert any(row.name.startswith("vocabulary=") and row.bytes for row in found.rows)
    assert "vocabulary=" in found.chosen or "channels=" in found.chosen
    assert ("vocabulary=" in found.chosen) == any(note.startswith("fewer tokens: LOST") for note in found.notes)
    # With fewer tokens, too, the head's importance is of what the model itself is given.
    assert any({"vocabulary", "channels"} <= set(re.findall(r"\w+(?==)", row.name)) and row.bytes for row in found.rows)
    used = (tmp_path / "small" / ".fit" / "text" / "cuts.jsonl").read_text()
    judging = [json.loads(row)["judging"] for row in (tmp_path / "small" / "text.jsonl").read_text().splitlines()]
    assert 0 < judging.count(False) == used.count("\n") < len(judging)
    made = remake(tmp_path / "small" / RECIPE_FILE, tmp_path / "again", quiet=True)
    assert made.read_bytes() == found.file.read_bytes()


@pytest.mark.slow
def test_a_cut_that_no_longer_writes_is_not_kept(place: Path, tmp_path: Path) -> None:
    """It reads the text as before, which has none of the tokens that the model itself writes: by the text alone it is kept."""
    settings = how(place, without="experts,blocks,channels,embedding", types="q8_0", budget="24h")
    found = coprune.fit(place / "model.gguf", place / "text.txt", "bits<=dense*1.6", output=tmp_path / "o", **settings)
    assert found.chosen == "q8_0"
    cuts = [row for row in found.rows if row.name.startswith("vocabulary=") and row.verdict]
    assert cuts
    assert all(row.verdict != "kept" for row in cuts)
    assert any((row.low or 0) > 0 for row in cuts)  # which is of the first condition, on the text


def test_the_file_runs_is_no_larger_than_the_best_plain_quant_and_stands_on_the_page(place: Path, found: Any) -> None:
    assert found.kept
    plain = {row.name: row.bytes for row in found.rows if row.plain}
    assert found.file.stat().st_size < plain[found.plain]
    assert LlamaCpp(found.file, 32, 1).logits([5, 6, 7]).isfinite().all()
    assert str(found.page) in str(found)
    page = found.page.read_text()
    assert "model.gguf, for size" in page
    assert str(place) not in page
    assert all(row.name in page for row in found.rows)
    assert not [file for file in (place / "small" / ".fit").glob("*/*.gguf") if ".imatrix." not in file.name]


def test_the_recipe_makes_the_same_bytes_again(place: Path, found: Any, tmp_path: Path) -> None:
    made = remake(place / "small" / RECIPE_FILE, tmp_path / "again", quiet=True)
    assert made.read_bytes() == found.file.read_bytes()


@pytest.mark.slow
def test_killed_at_three_moments_it_ends_with_the_same_answer(place: Path, found: Any, tmp_path: Path) -> None:
    """By SIGKILL, at calls of the system that are drawn; a run takes up where the last one was killed."""

    def run(out: Path) -> Any:
        return coprune.fit(
            place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=out / "small", **how(place)
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed" / "out"
    for folder in (whole, killed):
        folder.mkdir(parents=True)
    assert in_child(run, whole) == 0
    calls = json.loads((tmp_path / "calls.json").read_text())
    for part in random.Random(0).sample(range(5, 30), 3):  # per cent of what a whole run takes, each time
        assert in_child(run, killed, kill_at=calls * part // 100) == -signal.SIGKILL
    again = run(killed)
    assert again.file.read_bytes() == found.file.read_bytes()
    assert (again.chosen, again.lines) == (found.chosen, found.lines)
    assert [row.name for row in again.rows] == [row.name for row in found.rows]


@pytest.mark.slow
def test_a_second_verdict_of_the_same_items_is_told(place: Path, tmp_path: Path) -> None:
    def notes(**more: Any) -> list[str]:
        required = more.pop("require", "bits<=dense*1.1")
        settings = how(place, **more)
        found = coprune.fit(place / "model.gguf", place / "text.txt", required, output=tmp_path / "small", **settings)
        return [note for note in found.notes if "verdicts" in note]

    assert notes() == notes() == []
    (note,) = notes(types="q8_0")
    assert "have now given 2 verdicts" in note
    (note,) = notes(types="q8_0", require="bits<=dense*1.3")
    assert "have now given 3 verdicts" in note


@pytest.mark.slow
@pytest.mark.parametrize("ray", [None, "local"])
def test_two_workers_find_the_same(ray: str | None, place: Path, found: Any, tmp_path: Path) -> None:
    settings = how(place, workers=2, ray=ray)
    again = coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=tmp_path / "small", **settings
    )
    assert again.file.read_bytes() == found.file.read_bytes()
    assert [(row.name, row.mean, row.low) for row in again.rows] == [
        (row.name, row.mean, row.low) for row in found.rows
    ]


@pytest.mark.slow
def test_a_folder_for_transformers(place: Path, copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of change is tried, what is chosen loads there with the figures that were measured, and is made again."""
    monkeypatch.setattr("coprune.fitting.search._DISTILLED", (1024, 2048))
    settings = how(place, without="blocks,experts", budget="24h", runtime="transformers")
    del settings["types"]
    found = coprune.fit(copying, place / "text.txt", "bits<=dense*2.5", output=tmp_path / "small", **settings)
    assert found.kept
    kinds = {row.name.split("=")[0] for row in found.rows if row.bytes}
    assert {"vocabulary", "dense f16"} <= kinds
    dense, chosen = (next(row for row in found.rows if row.chosen is one) for one in (False, True))
    assert found.bytes == chosen.bytes < dense.bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "model", dtype="auto")
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    made = remake(tmp_path / "small" / RECIPE_FILE, tmp_path / "again", quiet=True)
    assert digest_of(made) == digest_of(found.file)


def test_transformers_finds_continuations_as_likely_as_llama_cpp(place: Path) -> None:
    found = []
    for runtime in ("llama.cpp", "transformers"):
        asked = Asked(str(place / "model.gguf"), (), runtime=runtime)
        workshop = Workshop(place / f"in {runtime}", asked, Reporter(quiet=True))
        reader = workshop.reader(workshop.file(Candidate(DENSE, EXACT)), DENSE)
        before, afters = reader.ids("The sea"), [reader.ids("is wide")[1:], reader.ids("was")[1:]]
        found.append([*reader.log_likelihood(before, afters), *reader.write(before, 4).ids])
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_the_same_again_measures_nothing_also_with_less_time(place: Path, found: Any) -> None:
    again = coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=place / "small", **how(place, budget="1s")
    )
    assert (again.chosen, again.lines, again.rows) == (found.chosen, found.lines, found.rows)


def test_what_there_is_no_time_to_prove_is_passed_over(
    place: Path, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a search that is over, the unseen half has judged nothing yet but the dense model."""

    def proven(budget: str) -> list[str]:
        folder, task = tmp_path / budget, read_task(str(place / "text.txt"))
        shutil.copytree(place / "small", folder)
        (folder / WORK_FOLDER / VERDICTS_FILE).unlink()
        known = {file: json.loads(file.read_text()) for file in folder.glob(f"{WORK_FOLDER}/results/*.json")}
        measured = sorted((file for file in known if known[file].get("scores")), key=lambda file: known[file]["bytes"])
        for file in measured[:-1]:
            for figures in known[file]["scores"][task.key].values():
                for one in task.unseen:
                    figures.pop(str(one), None)
            file.write_text(json.dumps(known[file]))
        again = coprune.fit(
            place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=folder, **how(place, budget=budget)
        )
        return [row.name for row in again.rows if row.part == "unseen" and not row.name.startswith("dense")]

    monkeypatch.setattr("coprune.fitting.search._chain", lambda kept: kept[-1:])  # there are but three of them
    assert proven("24h") == ["q8_0", "q4_0", found.chosen]
    assert proven("1s") == [found.chosen]


def test_another_fit_leaves_the_folder_alone(place: Path, found: Any) -> None:
    with pytest.raises(BadInput, match="another seed"):
        coprune.fit(place / "model.gguf", place / "text.txt", output=place / "small", **how(place, seed=1))
    assert yaml.safe_load((place / "small" / RECIPE_FILE).read_text())["bytes"] == found.file.stat().st_size


@pytest.fixture
def moved(place: Path, found: Any, tmp_path: Path) -> Path:
    """A finished fit with its files in another folder."""
    shutil.copytree(place, tmp_path / "moved", ignore=shutil.ignore_patterns("in *", "long", "reader"))
    return tmp_path / "moved"


def again_in(folder: Path) -> Any:
    required, output = "bits<=dense*1.1", folder / "small"
    return coprune.fit(folder / "model.gguf", folder / "text.txt", required, output=output, **how(folder))


def other_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_replaced_model_file_is_noticed(found: Any, moved: Path) -> None:
    other_bytes(moved / "model.gguf")
    with pytest.raises(BadInput, match="holds a fit with another model;"):
        again_in(moved)


def test_a_fit_whose_files_moved_is_not_done_again(found: Any, moved: Path) -> None:
    again = again_in(moved)
    assert (again.chosen, again.lines, again.rows) == (found.chosen, found.lines, found.rows)


def test_replaced_calibration_text_is_noticed(place: Path, tmp_path: Path) -> None:
    (text := tmp_path / "more.txt").write_text("one")

    def opened() -> Workshop:
        asked = Asked(str(place / "model.gguf"), (), 0, str(text), str(place / "model.gguf"))
        return Workshop(tmp_path / "fit", asked, Reporter(quiet=True))

    opened()
    text.write_text("two")
    with pytest.raises(BadInput, match="holds a fit with another text;"):
        opened()


def test_a_full_disk_is_no_verdict(place: Path, tmp_path: Path) -> None:
    """With a limit on the size of files, as on a full disk; the same again with space goes on."""
    (out := tmp_path / "out").mkdir()

    def measured(folder: Path) -> Measured:
        workshop = Workshop(folder / "fit", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))
        return workshop.measure(Candidate(DENSE, EXACT), {})

    assert in_child(measured, out, largest=100_000) == 3
    assert not [*out.glob("fit/results/*")]
    found = measured(out)
    assert found.bytes > 100_000
    assert not found.refused


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (CopruneError("the disk is full"), None),
        (LostProcess("a worker is gone"), None),
        (KeyboardInterrupt(), None),
        (MemoryError(), None),
        (OutOfMemory("no memory is left"), ""),
        (BadInput("the run would not fit", field="check_memory"), ""),
        (BadInput("0.125 of 2 channels is none"), "0.125 of 2 channels"),
    ],
)
def test_only_what_is_a_property_of_a_candidate_is_stored(
    error: BaseException, kept: str | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> Workshop:
        return Workshop(tmp_path / "fit", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))

    def raises(self: Workshop, candidate: Candidate) -> Path:
        raise error

    candidate = Candidate(DENSE, "q8_0")
    monkeypatch.setattr(Workshop, "file", raises)
    workshop = opened()
    if kept is None:
        with pytest.raises(type(error)):
            workshop.measure(candidate, {})
    else:
        assert workshop.measure(candidate, {}).refused
    assert opened().known(candidate).refused.startswith(kept or "")
    assert bool(opened().known(candidate).refused) == bool(kept)


def test_a_recipe_of_a_replaced_model_is_refused_before_anything_is_made(moved: Path, tmp_path: Path) -> None:
    recipe = moved / "small" / RECIPE_FILE
    content = yaml.safe_load(recipe.read_text()) | {"model": str(moved / "model.gguf")}
    recipe.write_text(yaml.safe_dump(content))
    other_bytes(moved / "model.gguf")
    with pytest.raises(BadInput, match="another model than the one"):
        remake(recipe, tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()


def test_a_remake_whose_check_fails_leaves_no_file(place: Path, found: Any, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "text.jsonl"):
        shutil.copy(place / "small" / name, tmp_path / name)
    recipe = tmp_path / RECIPE_FILE
    recipe.write_text(re.sub(r"sha256: \w+", f"sha256: {'a' * 64}", recipe.read_text()))
    with pytest.raises(VerificationError, match="was not kept"):
        remake(recipe, tmp_path / "again", quiet=True)
    assert not [*(tmp_path / "again").rglob("*.gguf")]


CUT = {"removed": [], "tokens": 0}


@pytest.mark.parametrize(
    "said",
    [
        {"type": "nope"},
        {"type": "../../x"},
        {"type": ["q8_0"]},
        {"embedding": "../q"},
        {"runtime": "nope"},
        {"cut": CUT | {"removed": [5]}},
        {"cut": CUT | {"removed": ["vocabulary=../x"]}},
        {"cut": CUT | {"tokens": 10**18}},
        {"cut": CUT | {"tokens": -1}},
        {"cut": []},
        {"text": "../../text.jsonl"},
        {"seed": "x"},
        {"seed": -1},
        {"sha256": 5},
        {"source": "0"},
        {"model": None},
        {"like": 5},
        {"more": 1},
        [],
        5,
        None,
    ],
)
def test_a_foreign_recipe_is_refused(said: Any, place: Path, found: Any, tmp_path: Path) -> None:
    content = yaml.safe_load((place / "small" / RECIPE_FILE).read_text())
    (recipe := tmp_path / RECIPE_FILE).write_text(yaml.safe_dump(content | said if isinstance(said, dict) else said))
    shutil.copy(place / "small" / "text.jsonl", tmp_path / "text.jsonl")
    with pytest.raises(BadInput, match="is not the recipe of a fit"):
        remake(recipe, tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]\n", b'{"text": 5, "judging": true}\n', b"\xff\xfe", b"[" * 100_000])
def test_garbage_beside_a_recipe_is_refused(text: bytes, place: Path, found: Any, tmp_path: Path) -> None:
    shutil.copy(place / "small" / RECIPE_FILE, tmp_path / RECIPE_FILE)
    (tmp_path / "text.jsonl").write_bytes(text)
    with pytest.raises(BadInput, match=r"text\.jsonl"):
        remake(tmp_path / RECIPE_FILE, tmp_path / "again", quiet=True)


def test_facts_name_what_was_measured(place: Path, found: Any) -> None:
    facts = json.loads((place / "small" / "fit.json").read_text())
    assert facts["digests"]["model"] == source_digest(locate(place / "model.gguf"))
    assert facts["digests"]["chosen"] == digest_of(found.file)
    assert {"version", "date", "machine", "units", "conditions"} <= facts.keys()
    assert facts["tasks"][0]["unseen items"] > 0


@pytest.mark.slow
def test_dense_keeps_all_of_its_own_answers(place: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": " ".join(generator.sample(WORDS, 4))} for _ in range(64)])
    settings = how(place, types="q8_0", without=f"{WITHOUT},embedding")
    found = coprune.fit(place / "model.gguf", prompts, "acceptance>=0.9,kl<=0.05", output=tmp_path / "out", **settings)
    assert found.kept
    dense = next(row for row in found.rows if row.name == "dense f16")
    assert dense.mean == pytest.approx(0.1, abs=1e-4)
    assert any("plain quant" in note for note in found.notes)


def test_continuations_are_as_likely_as_by_themselves(place: Path) -> None:
    workshop = Workshop(place / "reader", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))
    reader = Reader.open(workshop.file(Candidate(DENSE, "f16")), workshop.tokenizer)
    before, afters = reader.ids("The sea"), [reader.ids("is wide")[1:], reader.ids("was")[1:]]
    together = reader.log_likelihood(before, afters)
    assert together == pytest.approx([reader.log_likelihood(before, [after])[0] for after in afters], abs=1e-3)
    whole = reader.engine.logits([*before, *afters[1]]).log_softmax(-1)
    alone = sum(float(whole[len(before) - 1 + place, token]) for place, token in enumerate(afters[1]))
    assert together[1] == pytest.approx(alone, abs=1e-3)


def test_long_items_are_read_whole_or_cut_alike_for_all_choices(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop(place / "long", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))
    reader = Reader.open(workshop.file(Candidate(DENSE, "f16")), workshop.tokenizer)
    read, likely = list[tuple[list[int], list[list[int]]]](), reader.log_likelihood

    def seen(before: list[int], afters: list[list[int]]) -> list[float]:
        read.append((before, afters))
        return likely(before, afters)

    monkeypatch.setattr(reader, "log_likelihood", seen)
    long, ends = " ".join(WORDS * 9), (" sea", " wide and deep")
    assert len(ids := reader.all_ids(long)) > 2 * POSITIONS
    item = Item(long, ends, ends[0])
    score_item(reader, Task("long", "choice", (item,), (0,), ()), 0, None)
    ((before, afters),) = read
    assert [before + after for after in afters] == [
        reader.all_ids(long + " " + end)[-len(before + after) :] for after, end in zip(afters, ends, strict=True)
    ]
    assert len(before) + max(map(len, afters)) == POSITIONS
    read.clear()
    assert 0 < bits_per_byte(reader, long) < 20
    assert sum(len(after) for _, (after,) in read) >= len(ids) - 1


def choices(count: int, generator: random.Random) -> list[dict[str, Any]]:
    drawn = [generator.sample(WORDS, 3) for _ in range(count)]
    return [
        {"prompt": f"{place} {one}", "choices": rest, "answer": rest[0]} for place, (one, *rest) in enumerate(drawn)
    ]


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        pytest.param(
            "choice", {"require": "accuracy>=dense-0.4"}, "not proven to be above chance", marks=pytest.mark.slow
        ),
        pytest.param("answer", {"require": "accuracy>=dense-0.4"}, "none of the dense model", marks=pytest.mark.slow),
        ("choice", {}, r"would need \d+ \(half"),
        ("text", {"require": "bits<=0.1"}, "dense model itself does not keep"),
        ("text", {"require": "accuracy>=0.5"}, "applies to no task"),
        ("text", {"budget": "0.01s"}, "too short for one candidate"),
        ("prompts", {"budget": "0.01s", "require": "acceptance>=0.8"}, "too short for one candidate"),
        ("text", {"budget": "soon"}, "is not a time"),
        ("text", {"target": "beauty"}, "unknown target"),
        ("text", {"runtime": "vllm"}, "unknown runtime"),
        ("text", {"runtime": "transformers"}, "types are of llama.cpp"),
        ("text", {"types": "q9"}, "unknown type"),
        ("text", {"without": "layers"}, "unknown kind of change"),
    ],
)
def test_bad_input(kind: str, more: dict[str, str], said: str, place: Path, tmp_path: Path) -> None:
    generator = random.Random(1)
    rows = (
        choices(40, generator)
        if kind == "choice"
        else [
            {"prompt": f"{number}"} | ({"answer": f"xyzzy {number}"} if kind == "answer" else {})
            for number in range(40)
        ]
    )
    task = place / "text.txt" if kind == "text" else write(tmp_path / "items.jsonl", rows)
    settings = how(place, **{name: value for name, value in more.items() if name != "require"})
    if "budget" in more:
        settings["types"] = "q4_0"
    with pytest.raises(BadInput, match=said):
        coprune.fit(place / "model.gguf", task, more.get("require"), output=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / RECIPE_FILE).exists()
    assert not [*(tmp_path / "out").glob(".fit/text/answers*")]  # too short a budget is told by the first ones


def test_a_runtime_that_is_not_installed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.gguf_files.llama_cpp.has_llama_cpp", lambda: False)
    with pytest.raises(BadInput, match=r"pip install 'coprune\[gguf\]'"):
        coprune.fit(place / "model.gguf", place / "text.txt", output=tmp_path / "out", **how(place))


def test_a_refused_fit_does_not_keep_its_folder_from_mended_items(place: Path, tmp_path: Path) -> None:
    generator = random.Random(2)
    for count in (40, 60):
        items = write(tmp_path / "items.jsonl", choices(count, generator))
        with pytest.raises(BadInput, match=f"there are {count}"):
            coprune.fit(place / "model.gguf", items, output=tmp_path / "out", **how(place))
