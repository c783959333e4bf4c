"""The budget limits the number of items, the model's own text, and slow candidates."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.fitting.budget import Budget
from coprune.fitting.calibration import all_windows, own_count, read_passages, texts_in
from coprune.fitting.candidates import DENSE, EXACT, MIXED, Candidate
from coprune.fitting.finding import Wish
from coprune.fitting.fit_notes import Asked
from coprune.fitting.making import Done
from coprune.fitting.reader import Reader
from coprune.fitting.require import few_items, read_conditions
from coprune.fitting.search import Search
from coprune.fitting.tasks import Task, read_tasks
from coprune.fitting.team import Team
from coprune.fitting.workshop import Workshop
from coprune.gguf_files.llama_cpp import has_llama_cpp
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import TEXTS, content_of

pytestmark = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
WORDS = "\n".join(TEXTS).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file, tokenizer = tmp_path_factory.mktemp("budget") / "model.gguf", content_of("bytes")
    size = len(json.loads(tokenizer)["model"]["vocab"])
    made = pico_model("llama", vocab_size=size, max_position_embeddings=1024, tie_word_embeddings=True)
    write_pico_gguf(distinct_norms(made), file, tokenizer=tokenizer)
    return file


def text_task(folder: Path, passages: int) -> tuple[Task, ...]:
    generator = random.Random(0)
    lines = [
        " ".join(generator.choice(WORDS) + str(generator.randrange(99)) for _ in range(60)) for _ in range(passages)
    ]
    (file := folder / "text.txt").write_text("\n".join(lines))
    return read_tasks([str(file)])


def prompt_tasks(folder: Path, count: int = 20) -> tuple[Task, ...]:
    names = []
    for seed in range(2):
        generator = random.Random(seed)
        rows = [{"prompt": " ".join(generator.sample(WORDS, 6))} for _ in range(count)]
        names.append(file := folder / f"{seed}.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_tasks([*map(str, names)])


class Said(Reporter):
    """A reporter that records its messages."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines = list[str]()

    def say(self, text: str) -> None:
        self.lines.append(text)


Opening = Callable[[Sequence[Task]], Workshop]


@pytest.fixture
def opened(model: Path, tmp_path: Path) -> Opening:
    return lambda tasks: Workshop(tmp_path / "fit", Asked(str(model), tuple(tasks)), Said())


def test_a_text_uses_as_many_items_as_the_budget_allows(opened: Opening, tmp_path: Path) -> None:
    tasks = text_task(tmp_path, 2000)
    workshop = opened(tasks)
    started = time.perf_counter()
    (few,) = Budget(workshop, 30.0, 1).affordable_tasks({tasks[0].key: 8})
    assert time.perf_counter() - started < 30
    assert 8 <= len(few.unseen) < len(tasks[0].unseen)
    assert few.unseen == tasks[0].unseen[: len(few.unseen)]
    (line,) = [line for line in workshop.reporter.lines if "to fit the budget" in line]  # type: ignore[attr-defined]
    assert line.startswith(f"Using {len(few.seen) + len(few.unseen):,} of 2,000 items of ")
    (more,) = Budget(workshop, 60.0, 1).affordable_tasks({tasks[0].key: 8})
    assert len(more.unseen) == pytest.approx(2 * len(few.unseen), rel=0.05)
    (same,) = Budget(workshop, 30.0, 1).affordable_tasks({tasks[0].key: 8})
    assert same == more  # those of the earlier call


def test_the_time_before_the_search_counts_too(model: Path, tmp_path: Path) -> None:
    asked, began = Asked(str(model), tuple(text_task(tmp_path, 2000))), time.monotonic() - 100
    workshop = Workshop(tmp_path / "fit", asked, Said(), began)
    workshop.note_rest()
    assert 100 < Budget(workshop, 300.0, 1).elapsed < 130


def test_items_suffice_for_a_model_that_loses_half_of_what_is_allowed(opened: Opening, tmp_path: Path) -> None:
    tasks = text_task(tmp_path, 2000)
    (usual,) = Budget(opened(tasks), 30.0, 1).affordable_tasks({tasks[0].key: 8})
    least = len(usual.unseen)
    (file,) = tmp_path.glob("**/items.json")
    file.unlink()  # a call that has counted no items yet
    (more,) = Budget(opened(tasks), 30.0, 1).affordable_tasks({tasks[0].key: least})
    assert len(more.unseen) == 2 * least
    file.unlink()
    (half_as_long,) = Budget(opened(tasks), 15.0, 1).affordable_tasks({tasks[0].key: least})
    assert len(half_as_long.unseen) == pytest.approx(1.25 * least, rel=0.05)  # a quarter of the budget, not half of it


def test_items_that_prove_only_a_model_like_the_dense_one_are_told(tmp_path: Path) -> None:
    (condition,) = read_conditions("acceptance>=0.9")
    few, enough = prompt_tasks(tmp_path, 60)[0], prompt_tasks(tmp_path, 120)[0]
    assert few_items(condition, few, [1.0] * 30) == (
        f"60 items of {few.name} prove acceptance>=0.9 only for a model that loses little; one that loses half of what is "
        "allowed needs about 116: use more items, or require acceptance>=0.81"
    )
    assert not few_items(condition, enough, [1.0] * 60)
    half = [0.95] * 58  # loses half of what is allowed
    assert condition.is_kept(half, [1.0] * 58)
    assert not condition.is_kept(half[:30], [1.0] * 30)


def test_a_budget_too_short_for_a_proof_is_refused_before_the_search(opened: Opening, tmp_path: Path) -> None:
    tasks = text_task(tmp_path, 2000)
    with pytest.raises(BadInput, match=r"too short for one candidate; the minimum is about \d"):
        Budget(opened(tasks), 0.5, 1).affordable_tasks({tasks[0].key: 1000})


def test_only_what_passed_on_the_seen_items_is_proven_first(opened: Opening, tmp_path: Path) -> None:
    tasks = text_task(tmp_path, 80)
    search = Search(
        workshop := opened(tasks), Wish(read_conditions("bits<=dense*1.5"), types=("q8_0",)), Team(1, tmp_path)
    )
    search.measure_dense()
    mixed = Candidate(DENSE, MIXED, bits=8.0, types=(("blk.0.ffn_up.weight", "q8_0"),))
    search.tried[mixed] = workshop.measure(mixed, {task.name: task.seen for task in tasks})
    search._kept, search._safety = [mixed], {mixed: 1.0}
    finding = search._proven()
    assert [*finding.unseen] == [mixed]
    assert finding.kept


def test_making_is_expected_to_take_as_long_as_rounding_to_the_types(opened: Opening, tmp_path: Path) -> None:
    workshop = opened(text_task(tmp_path, 40))
    tried = [plain := Candidate(DENSE, "q4_k_m")]
    workshop.making.done.complete(workshop.making.key("quant", plain), Done(), 2.0)

    def seconds(type: str, *kinds: str) -> float:
        types = tuple((f"blk.{number}.ffn_up.weight", kind) for number, kind in enumerate(kinds))
        return Budget(workshop, 60.0, 1).expected(Candidate(DENSE, type, types=types), tried)

    assert seconds("q4_k_s") == 2.0
    assert seconds("q6_k") == seconds(MIXED, "q6_k", "q6_k") < seconds(MIXED, "q6_k", "q4_k") < 2.0
    assert seconds("iq3_xxs") > seconds(MIXED, "q6_k", "iq3_xxs") > 2.0


def test_a_short_fit_calibrates_on_its_items_only(
    opened: Opening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Reader, length: int, generator: object) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(Reader, "invent", never)
    workshop = opened(tasks := text_task(tmp_path, 40))
    workshop.measure(Candidate(DENSE, EXACT), {})
    workshop.collect(tasks, 0.0)
    assert {passage.text.strip() for passage in read_passages(workshop.making.text)}


def test_the_model_writes_what_time_allows_or_the_items_lack() -> None:
    assert own_count(100_000, texts_in(255)) == 0
    assert own_count(100_000, texts_in(1000)) == 3
    assert own_count(100_000, texts_in(10**9)) == 16
    assert own_count(0, texts_in(0)) == 2


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 479, 1024])
def test_a_short_text_is_measured_on_all_of_it(tokens: int) -> None:
    windows = all_windows(range(tokens), 256)
    assert 1 <= windows.shape[1] <= 256
    assert windows.flatten().tolist() == list(range(windows.numel()))
    assert tokens - windows.numel() < len(windows)


def test_the_models_own_text_depends_on_the_seed(
    opened: Opening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = opened(tasks := prompt_tasks(tmp_path))
    workshop.answer({task.name: task.seen for task in tasks})
    workshop.measure(Candidate(DENSE, EXACT), {})
    texts = []
    for _ in range(2):
        workshop.collect(tasks, 0.0)
        texts.append(workshop.making.text.read_text())
        workshop.making.text.unlink()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # so that it is not found there
    assert texts[0] == texts[1]
    assert any("writes" in line for line in workshop.reporter.lines)  # type: ignore[attr-defined]


def test_answers_of_two_prompt_tasks_are_stored_separately(opened: Opening, tmp_path: Path) -> None:
    one, other = prompt_tasks(tmp_path)
    workshop, places = opened([one, other]), [0, 1, 2, 3]
    workshop.answer({one.name: places, other.name: places})
    found = workshop.measure(Candidate(DENSE, EXACT), {one.name: places, other.name: places})
    for task in (one, other):
        assert found.of(task, "acceptance", places) == pytest.approx([1.0] * 4, abs=1e-3)


def test_a_quantisation_is_interrupted_at_the_deadline_and_made_with_more_time(opened: Opening, tmp_path: Path) -> None:
    workshop, quant = opened(text_task(tmp_path, 40)), Candidate(DENSE, "q8_0")
    workshop.collect(workshop.asked.tasks, 0.0)
    workshop.making.quantisation(quant)  # the files that it needs
    late = workshop.measure(quant, {}, until=time.perf_counter())
    assert not late.bytes
    assert not late.refused
    least = workshop.making.took_to_make(quant)
    assert Budget(workshop, 60.0, 1).expected(quant, []) >= least > 0
    assert workshop.measure(quant, {}).bytes


def test_a_candidate_that_runs_out_of_time_keeps_its_measurements(opened: Opening, tmp_path: Path) -> None:
    (task,) = text_task(tmp_path, 40)
    workshop, places = opened([task]), [*range(16)]
    found = workshop.measure(Candidate(DENSE, EXACT), {task.name: places}, until=time.perf_counter())
    assert found.bytes
    assert found.missing(task, places) == places
    assert not workshop.measure(Candidate(DENSE, EXACT), {task.name: places}).missing(task, places)
