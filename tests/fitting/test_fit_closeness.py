"""Closeness to the dense model along its answers: over the whole distribution, including the end of an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coprune.base.progress import Reporter
from coprune.fitting import score
from coprune.fitting.candidates import DENSE, Candidate
from coprune.fitting.fit_notes import Asked
from coprune.fitting.reader import Reader
from coprune.fitting.score import DenseAnswers, item_key, score_item
from coprune.fitting.tasks import Item, Task
from coprune.fitting.workshop import Workshop
from coprune.fitting.writing import is_sound, provable, writing_of
from coprune.gguf_files.llama_cpp import has_llama_cpp
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import TEXTS, content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
ITEMS = tuple(Item(prompt=text[:40]) for text in TEXTS[:12])
TASK = Task("prompts", "prompts", ITEMS, tuple(range(6)), tuple(range(6, 12)))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    """Return readers of a pico llama and of one that answers differently."""
    found, tokenizer = list[Reader](), content_of("bytes")
    for noise in (0.0, 0.5):
        folder = tmp_path_factory.mktemp("model")
        model = pico_model("llama", vocab_size=len(json.loads(tokenizer)["model"]["vocab"]))
        weight = model.get_output_embeddings().weight.data
        weight *= 2 * (1 + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        write_pico_gguf(distinct_norms(model), folder / "model.gguf", tokenizer=tokenizer)
        workshop = Workshop(folder / "fit", Asked(str(folder / "model.gguf"), ()), Reporter(quiet=True))
        found.append(workshop.making.reader(workshop.making.file(Candidate(DENSE, "f16")), DENSE))
    return found


def rows(reader: Reader, item: Item, ids: Sequence[int]) -> Tensor:
    return reader.along(reader.ids(item.prompt) or reader.begin, [ids])[0].double()


def test_closeness_is_over_the_whole_distribution(readers: list[Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Treating all tokens beyond the likeliest as one would make models look closer than they are."""
    monkeypatch.setattr(score, "_LIKELIEST", 16)
    one, other = readers
    answers, accepted, kl, as_one = DenseAnswers(), list[float](), list[float](), list[float]()
    for place, item in enumerate(ITEMS):
        answers.add(one, TASK, place)
        ids = answers.positions(item_key(TASK, place))
        expected, found = (rows(reader, item, ids).exp() for reader in (one, other))
        accepted.append(float(torch.minimum(expected, found).sum(1).mean()))
        kl.append(float((expected * (expected / found).log()).sum(1).mean()))
        top = expected.topk(16, dim=1).indices
        kept = [one.gather(1, top) for one in (expected, found)]
        lumped = [torch.cat([one, 1 - one.sum(1, keepdim=True)], dim=1) for one in kept]
        as_one.append(float(torch.minimum(*lumped).sum(1).mean()))
    scored = [score_item(other, TASK, place, answers) for place in range(len(ITEMS))]
    mean = sum(each["acceptance"] for each in scored) / len(scored)
    assert mean == pytest.approx(sum(accepted) / len(accepted), abs=0.003)
    assert sum(each["kl"] for each in scored) / len(scored) == pytest.approx(sum(kl) / len(kl), rel=0.02)
    assert sum(as_one) / len(as_one) > mean + 0.01


def test_few_tokens_are_stored_per_position(
    readers: list[Reader], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(score, "_LIKELIEST", 16)
    answers = DenseAnswers()
    answers.add(readers[0], TASK, 3)
    answers.save(tmp_path / "answers.safetensors")
    again = DenseAnswers.load(tmp_path / "answers.safetensors")
    key = item_key(TASK, 3)
    assert again.tokens[key].shape == (len(answers.positions(key)), 16 + 64)
    assert again.positions(key) == answers.positions(key)
    assert score_item(readers[1], TASK, 3, again) == score_item(readers[1], TASK, 3, answers)


def test_a_model_that_never_stops_is_less_close(readers: list[Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model soon ends its answer; the other differs only in the end token."""
    dense, item = readers[0], ITEMS[0]
    written = dense.write(dense.ids(item.prompt), 12).ids
    last = next(place for place in range(1, 12) if written[place] not in written[:place])
    written, end = written[: last + 1], written[last]
    with monkeypatch.context() as patched:
        patched.setattr(dense.engine, "ends", lambda token: token == end)
        answers = DenseAnswers()
        answers.add(dense, TASK, 0)
    key = item_key(TASK, 0)
    assert (answers.ids[key], answers.ends[key]) == (written[:-1], end)
    same = score_item(dense, TASK, 0, answers)
    assert same == {"acceptance": pytest.approx(1, abs=1e-5), "kl": pytest.approx(0, abs=1e-5)}
    ended = float(rows(dense, item, written)[-1, end].exp())
    along = dense.along

    def endless(before: Sequence[int], afters: Sequence[Sequence[int]]) -> list[Tensor]:
        found = along(before, afters)
        for one in found:
            one[-1, end] = -math.inf
        return [one.log_softmax(dim=-1) for one in found]

    monkeypatch.setattr(dense, "along", endless)
    assert score_item(dense, TASK, 0, answers)["acceptance"] == pytest.approx(1 - ended / len(written), abs=1e-5)


def test_answers_that_loop_or_never_end_are_not_sound() -> None:
    assert is_sound([1, 2, 3], ended=True, other_ended=True)
    assert is_sound([*range(32)], ended=False, other_ended=False)
    assert not is_sound([*range(32)], ended=False, other_ended=True)
    assert not is_sound([7, 8] * 16, ended=False, other_ended=False)


def test_tasks_without_long_answers_get_items_to_continue() -> None:
    text = Task("text", "text", tuple(Item(text=f"{place} and so on, and so on") for place in range(200)), *halves(200))
    (found,) = writing_of([text, TASK])
    assert (found.kind, len(found.seen), len(found.unseen)) == ("writing", 32, 32)
    assert found.items[7].prompt == "7 and so"
    assert provable(found)
    assert not provable(writing_of([Task("few", "text", text.items, *halves(20))])[0])


def halves(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(count // 2)), tuple(range(count // 2, count))
