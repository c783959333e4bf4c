"""A fit from items to a file in llama.cpp: proven, resumed, rebuilt from its recipe, and refused in one line."""

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
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.fitting.candidates import DENSE, EXACT, Candidate
from coprune.fitting.fit_call import FACTS_FILE, remake
from coprune.fitting.fit_notes import Asked, Measured
from coprune.fitting.fit_recipe import RECIPE_FILE
from coprune.fitting.looking import WORK_FOLDER
from coprune.fitting.made_model import digest_of
from coprune.fitting.making import Making
from coprune.fitting.reader import POSITIONS, Reader
from coprune.fitting.require import read_conditions
from coprune.fitting.score import bits_per_byte, score_item
from coprune.fitting.tasks import Item, Task
from coprune.fitting.type_mixtures import mixtures
from coprune.fitting.workshop import VERDICTS_FILE, Workshop
from coprune.gguf_files.llama_cpp import LlamaCpp, Quantisation, has_llama_cpp, quantize
from coprune.store.notes import read_note, write_note
from support.disturbing import in_child
from support.fits import WITHOUT, WORDS, how, tokens, write
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.task_items import read_task
from support.vocabularies import content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")


@pytest.fixture(scope="module")
def copying(place: Path) -> Path:
    """Return a folder with a model that repeats its last token, whatever is cut."""
    model = pico_model("llama", vocab_size=tokens(), max_position_embeddings=1024, tie_word_embeddings=True)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    weight.data.mul_(20)
    write_pico_gguf(distinct_norms(model), place / "copying.gguf", tokenizer=content_of("bytes"))
    return place / "copying.gguf"


@pytest.mark.slow
def test_smaller_vocabularies_and_fewer_channels_are_tried_and_can_be_rebuilt(
    place: Path, copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.fitting.budget.DISTILLED", (1024, 2048))
    settings = how(place, without="experts,blocks", types="q8_0", budget="24h")
    found = coprune.fit(copying, place / "text.txt", "bits<=dense*2.5", output=tmp_path / "small", **settings)
    assert found.kept
    assert [line.partition(":")[0] for line in found.lines[1:]] == ["still writes", "still writes"]
    assert any(row.name.startswith("vocabulary=") and row.bytes for row in found.rows)
    assert "vocabulary=" in found.chosen or "channels=" in found.chosen
    assert ("vocabulary=" in found.chosen) == any(note.startswith("fewer tokens: LOST") for note in found.notes)
    # Also with fewer tokens, the head's importance is measured on the model's own inputs.
    assert any({"vocabulary", "channels"} <= set(re.findall(r"\w+(?==)", row.name)) and row.bytes for row in found.rows)
    used = (tmp_path / "small" / ".fit" / "text" / "cuts.jsonl").read_text()
    judging = [json.loads(row)["judging"] for row in (tmp_path / "small" / "text.jsonl").read_text().splitlines()]
    assert 0 < judging.count(False) == used.count("\n") < len(judging)
    made = remake(tmp_path / "small" / RECIPE_FILE, tmp_path / "again", quiet=True)
    assert made.read_bytes() == found.file.read_bytes()


@pytest.mark.slow
def test_a_cut_that_no_longer_writes_fails(place: Path, tmp_path: Path) -> None:
    """The text has none of the tokens that the model writes, so by the text alone the cut would pass."""
    settings = how(place, without="experts,blocks,channels,embedding,mixed", types="q8_0", budget="24h")
    found = coprune.fit(place / "model.gguf", place / "text.txt", "bits<=dense*1.6", output=tmp_path / "o", **settings)
    assert found.chosen == "q8_0"
    cuts = [row for row in found.rows if row.name.startswith("vocabulary=") and row.verdict]
    assert cuts
    assert all(row.verdict != "kept" for row in cuts)
    assert any((row.low or 0) > 0 for row in cuts)  # of the first condition, on the text


def test_types_by_tensor_are_tried_and_can_be_rebuilt(place: Path, tmp_path: Path) -> None:
    settings = how(place, without="vocabulary,experts,channels,blocks", budget="24h")
    model, text = place / "model.gguf", place / "text.txt"
    found = coprune.fit(model, text, "bits<=dense*1.1", output=tmp_path / "small", **settings)
    assert found.kept
    assert found.chosen.endswith(" bits by tensor")
    assert found.plain is not None
    assert found.bytes < min(row.bytes for row in found.rows if row.plain and row.bytes)
    recipe = tmp_path / "small" / RECIPE_FILE
    made = remake(recipe, tmp_path / "again", quiet=True)
    assert made.read_bytes() == found.file.read_bytes()
    # The recipe fixes the types, whatever would be measured now.
    said = recipe.read_text()
    stored = {one.name: one.tensor_type.name.lower() for one in GGUFReader(made).tensors}
    assert all(f"  {name}: {kind}" in said for name, kind in stored.items() if kind != "f32")
    recipe.write_text(re.sub(r"(blk\.0\.attn_q\.weight): .*", r"\1: f64", said))
    with pytest.raises(BadInput, match="they should be of q8_0"):
        remake(recipe, tmp_path / "other", quiet=True)


def test_smaller_embeddings_of_plain_quants_are_tried_also_after_types_by_tensor(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest mixture stands in for the smallest one that passes on the seen items."""
    monkeypatch.setattr("coprune.fitting.search.mixtures", lambda workshop, cut: mixtures(workshop, cut)[:1])
    settings = how(place, types="q8_0", without="vocabulary,experts,channels,blocks", budget="24h")
    found = coprune.fit(place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=tmp_path / "o", **settings)
    (mixed,) = [row for row in found.rows if row.name.endswith(" bits by tensor")]
    assert mixed.verdict == "kept"
    assert found.kept
    assert found.chosen.startswith("q8_0, embeddings ")
    assert found.bytes < (mixed.bytes or 0)


def test_the_file_runs_is_no_larger_than_the_best_plain_quant_and_is_on_the_page(place: Path, found: Any) -> None:
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


@pytest.mark.slow
def test_a_fit_killed_three_times_ends_with_the_same_answer(
    place: Path, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL at random system calls; each run resumes the one before."""

    def run(out: Path) -> Any:
        return coprune.fit(
            place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=out / "small", **how(place)
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed" / "out"
    for folder in (whole, killed):
        folder.mkdir(parents=True)
    assert in_child(run, whole) == 0
    calls = json.loads((tmp_path / "calls.json").read_text())
    for part in random.Random(0).sample(range(5, 30), 3):  # per cent of a whole run's system calls
        assert in_child(run, killed, kill_at=calls * part // 100) == -signal.SIGKILL
    monkeypatch.setenv("XDG_CACHE_HOME", str(killed / "cache"))  # for the children
    again = run(killed)
    assert again.file.read_bytes() == found.file.read_bytes()
    assert (again.chosen, again.lines) == (found.chosen, found.lines)
    assert [row.name for row in again.rows] == [row.name for row in found.rows]


@pytest.mark.slow
def test_a_second_verdict_from_the_same_items_is_reported(place: Path, tmp_path: Path) -> None:
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
def test_two_workers_find_the_same_result(
    ray: str | None, place: Path, found: Any, store: Path, tmp_path: Path
) -> None:
    settings = how(place, workers=2, ray=ray)
    again = coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=tmp_path / "small", **settings
    )
    assert again.file.read_bytes() == found.file.read_bytes()
    assert [(row.name, row.mean, row.low) for row in again.rows] == [
        (row.name, row.mean, row.low) for row in found.rows
    ]


@pytest.mark.slow
def test_a_folder_is_fitted_for_transformers(
    place: Path, copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of change is tried; the chosen folder loads with the measured figures and can be rebuilt."""
    monkeypatch.setattr("coprune.fitting.budget.DISTILLED", (1024, 2048))
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
        reader = workshop.making.reader(workshop.making.file(Candidate(DENSE, EXACT)), DENSE)
        before, afters = reader.ids("The sea"), [reader.ids("is wide")[1:], reader.ids("was")[1:]]
        found.append([*reader.log_likelihood(before, afters), *reader.write(before, 4).ids])
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_a_repeated_fit_measures_nothing_even_with_less_time(place: Path, found: Any) -> None:
    again = coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=place / "small", **how(place, budget="1s")
    )
    assert (again.chosen, again.lines, again.rows) == (found.chosen, found.lines, found.rows)


def test_candidates_without_time_for_a_proof_are_skipped(
    place: Path, found: Any, known_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is over, but the unseen half has only judged the dense model."""

    def proven(budget: str) -> list[str]:
        folder, task = tmp_path / budget, read_task(str(place / "text.txt"))
        shutil.copytree(place / "small", folder)
        (folder / WORK_FOLDER / VERDICTS_FILE).unlink()
        notes = {file: read_note(file, Measured) for file in known_store.glob("fit-*.json")}
        known = {
            file: note.record for file, note in notes.items() if note is not None and task.key in note.record.scores
        }
        measured = sorted(known, key=lambda file: known[file].bytes)
        for file in measured[:-1]:
            for figures in known[file].scores[task.key].values():
                for one in task.unseen:
                    figures.pop(one, None)
            write_note(file, known[file])
        again = coprune.fit(
            place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=folder, **how(place, budget=budget)
        )
        return [row.name for row in again.rows if row.part == "unseen" and not row.name.startswith("dense")]

    monkeypatch.setattr("coprune.fitting.search._chain", lambda kept: kept[-1:])  # there are only three
    assert proven("24h") == ["q8_0", "q4_0", found.chosen]
    assert proven("1s") == [found.chosen]


def test_another_fit_is_refused_in_the_same_folder(place: Path, found: Any) -> None:
    with pytest.raises(BadInput, match="another seed"):
        coprune.fit(place / "model.gguf", place / "text.txt", output=place / "small", **how(place, seed=1))
    assert yaml.safe_load((place / "small" / RECIPE_FILE).read_text())["bytes"] == found.file.stat().st_size


def test_the_given_file_is_returned_if_nothing_smaller_is_proven(place: Path, tmp_path: Path) -> None:
    """An 8-bit quant of an 8-bit file is no gain, even with a few bytes less of metadata."""
    small = tmp_path / "small.gguf"
    coprune.export(place / "model.gguf", small, type="q8_0")
    settings = how(place, types="q8_0", without=f"{WITHOUT},embedding", budget="24h")
    found = coprune.fit(small, place / "text.txt", "bits<=dense*1.1", output=tmp_path / "out", **settings)
    assert not found.kept
    assert found.file.read_bytes() == small.read_bytes()
    assert found.given_bytes == found.bytes == small.stat().st_size
    assert "1.00 of the" in str(found)
    assert "nothing better" in str(found)
    assert any("your own model, byte for byte" in note for note in found.notes)
    assert not any("more items" in note for note in found.notes)  # all that was tried passed
    assert remake(tmp_path / "out" / RECIPE_FILE, tmp_path / "again", quiet=True).read_bytes() == small.read_bytes()


def test_time_that_is_left_takes_items_until_something_is_proven(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coprune.fitting.budget._READING", 1e-9)  # as if the items were long
    monkeypatch.setattr("coprune.fitting.budget._PROVING", 1e-9)
    generator = random.Random(0)
    rows = [{"prompt": " ".join(generator.sample(WORDS, 8))} for _ in range(300)]
    task = write(tmp_path / "prompts.jsonl", rows)
    settings = how(place, types="q4_0", without=f"{WITHOUT},embedding", budget="24h")
    found = coprune.fit(place / "model.gguf", task, "acceptance>=0.88", output=tmp_path / "out", **settings)
    (condition,) = read_conditions("acceptance>=0.88")
    (counted,) = json.loads((tmp_path / "out" / FACTS_FILE).read_text())["tasks"]
    assert found.kept
    assert found.chosen == "q4_0"
    assert (condition.least_items() or 0) < counted["unseen items"] == counted["seen items"] < 150


def test_quants_larger_than_the_given_file_are_not_made_for_the_proof(place: Path, tmp_path: Path) -> None:
    coprune.export(place / "model.gguf", tmp_path / "given.gguf", type="q4_1")
    settings = how(place, types="q8_0,q4_1,q4_0", without=f"{WITHOUT},embedding", budget="24h")
    task, output = place / "text.txt", tmp_path / "out"
    found = coprune.fit(tmp_path / "given.gguf", task, "bits<=dense*1.5", output=output, **settings)
    tried = {row.name for row in found.rows}
    assert "q4_1" in tried
    assert "q8_0" not in tried


def test_a_type_that_is_slow_to_make_leaves_the_time_to_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "coprune.fitting.search.Search._has_time", lambda self, one, share=1.0: not one.type.startswith("iq")
    )
    settings = how(place, types="q8_0,iq4_nl,q4_0", without=f"{WITHOUT},embedding", budget="24h")
    task, output = place / "text.txt", tmp_path / "out"
    found = coprune.fit(place / "model.gguf", task, "bits<=dense*1.5", output=output, **settings)
    assert found.kept
    assert "q4_0" in {row.name for row in found.rows}


def test_a_quantisation_that_reaches_the_deadline_is_not_tried_and_others_are_proven(
    place: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(source: Path, target: Path, asked: Quantisation, until: float) -> None:
        quantize(source, target, asked, 0.0 if asked.kind == "q4_0" else until)

    monkeypatch.setattr("coprune.gguf_files.copied_tensors.quantize", hangs)
    settings = how(place, types="q8_0,q4_0", without=f"{WITHOUT},embedding", budget="24h")
    found = coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.5", output=tmp_path / "out", **settings
    )
    assert found.chosen == "q8_0"
    assert any("q4_0 would be next" in note for note in found.notes)


def test_untried_candidates_are_listed_with_the_command_for_more_time(place: Path, tmp_path: Path) -> None:
    items, text = place / "text.txt", str(place / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coprune.fitting.search.Search._has_time", lambda self, candidate, share=1.0: not self.tried)
        settings = how(place, types="q8_0,q4_0", without="embedding,mixed", budget="20m")
        found = coprune.fit(place / "model.gguf", items, "bits<=dense*1.1", output=tmp_path / "out", **settings)
    assert found.next.startswith(f"coprune.fit({str(place / 'model.gguf')!r}, task={str(items)!r}")
    assert f"text={text!r}" in found.next
    assert found.next.endswith("budget='60m')")
    assert str(found).endswith(found.next)


def test_a_skipped_distillation_is_named_and_done_with_more_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(tokens: int) -> Any:
        monkeypatch.setattr("coprune.fitting.budget.DISTILLED", (tokens, tokens))
        settings = how(place, types="q8_0", without="vocabulary,blocks,embedding,mixed", budget="24h")
        task, output = place / "text.txt", tmp_path / "out"
        return coprune.fit(place / "model.gguf", task, "bits<=dense*1.1", output=output, **settings)

    def cannot(*_: object, **__: object) -> None:
        raise BadInput("nothing is cut here")

    monkeypatch.setattr("coprune.fitting.making.prune", cannot)
    short = found(1 << 40)
    assert short.chosen == "q8_0"
    assert any("channels=0.125" in note and "would be next (and 1 others)" in note for note in short.notes)
    assert short.next.endswith("budget='4320m')")
    longer = found(2048)
    cuts = {row.name: row.refused for row in longer.rows if "distilled" in row.name}
    assert cuts == {
        f"channels={part}, distilled on 2,048 tokens q8_0": "nothing is cut here." for part in (0.125, 0.25)
    }
    assert not longer.next


def test_the_given_file_is_returned_if_nothing_can_be_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(self: Making, candidate: Candidate) -> Any:
        raise BadInput("llama.cpp could not make the type")

    monkeypatch.setattr(Making, "_quants", cannot)
    settings = how(place, types="q4_1", without=f"{WITHOUT},embedding", budget="24h")
    found = coprune.fit(
        place / "model.gguf", place / "text.txt", "bits<=dense*1.1", output=tmp_path / "out", **settings
    )
    assert (found.kept, found.better) == (False, False)
    assert found.file.read_bytes() == (place / "model.gguf").read_bytes()
    assert [row.refused for row in found.rows if row.name == "q4_1"] == ["llama.cpp could not make the type."]


@pytest.mark.slow
def test_the_dense_model_accepts_its_own_answers_completely(place: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": " ".join(generator.sample(WORDS, 4))} for _ in range(64)])
    settings = how(place, types="q8_0", without=f"{WITHOUT},embedding")
    found = coprune.fit(place / "model.gguf", prompts, "acceptance>=0.9,kl<=0.05", output=tmp_path / "out", **settings)
    assert found.kept
    dense = next(row for row in found.rows if row.name == "dense f16")
    assert dense.mean == pytest.approx(0.1, abs=1e-4)
    assert any("plain quant" in note for note in found.notes)


def test_continuations_read_together_are_as_likely_as_alone(place: Path) -> None:
    workshop = Workshop(place / "reader", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))
    reader = Reader.open(workshop.making.file(Candidate(DENSE, "f16")), workshop.making.tokenizer)
    before, afters = reader.ids("The sea"), [reader.ids("is wide")[1:], reader.ids("was")[1:]]
    together = reader.log_likelihood(before, afters)
    assert together == pytest.approx([reader.log_likelihood(before, [after])[0] for after in afters], abs=1e-3)
    whole = reader.engine.logits([*before, *afters[1]]).log_softmax(-1)
    alone = sum(float(whole[len(before) - 1 + place, token]) for place, token in enumerate(afters[1]))
    assert together[1] == pytest.approx(alone, abs=1e-3)


def test_long_items_are_read_whole_or_truncated_alike_for_all_choices(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(place / "long", Asked(str(place / "model.gguf"), ()), Reporter(quiet=True))
    reader = Reader.open(workshop.making.file(Candidate(DENSE, "f16")), workshop.making.tokenizer)
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
        ("text", {"budget": "soon"}, "is not a time of a search"),
        ("text", {"budget": "9" * 400}, "is not a time of a search"),
        ("text", {"target": "beauty"}, "target cannot be 'beauty'"),
        ("text", {"runtime": "vllm"}, "runtime cannot be 'vllm'"),
        ("text", {"runtime": "transformers"}, "types are of llama.cpp"),
        ("text", {"types": "q9"}, "unknown type"),
        ("text", {"without": "layers"}, "without cannot be 'layers'"),
    ],
)
def test_a_fit_refuses_bad_input(
    kind: str, more: dict[str, str], said: str, place: Path, tmp_path: Path, store: Path
) -> None:
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
    assert not [*(tmp_path / "out").glob(".fit/text/answers*")]  # the first answers show that the budget is too short


def test_a_missing_runtime_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.gguf_files.llama_cpp.has_llama_cpp", lambda: False)
    with pytest.raises(BadInput, match=r"pip install 'coprune\[gguf\]'"):
        coprune.fit(place / "model.gguf", place / "text.txt", output=tmp_path / "out", **how(place))


def test_a_refused_fit_leaves_its_folder_to_corrected_items(place: Path, tmp_path: Path) -> None:
    generator = random.Random(2)
    for count in (40, 60):
        items = write(tmp_path / "items.jsonl", choices(count, generator))
        with pytest.raises(BadInput, match=f"there are {count}"):
            coprune.fit(place / "model.gguf", items, output=tmp_path / "out", **how(place))
