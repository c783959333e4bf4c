"""Foreign task definitions: their code only runs with the user's consent, and their templates have limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.base import limited
from coprune.base.errors import BadInput
from coprune.evaluation import harness_trust
from coprune.evaluation.zero_shot import ZeroShotSettings
from support.pico import pico_model
from support.pico_folder import pico_tokenizer
from support.task_items import DEFINITIONS, read_task, word_items

pytest.importorskip("lm_eval")
from coprune.evaluation.harness import zero_shot
from coprune.evaluation.harness_tasks import find_tasks

ITEMS = "".join(f'{{"word": "w{number}", "label": {number % 2}}}\n' for number in range(20))
DEFINITION = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: {text}
doc_to_choice: ["w1", "w2"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def define(folder: Path, text: str = '"{{word}}"', more: str = "") -> Path:
    """Write a definition with a template for its prompts."""
    (folder / "items.jsonl").write_text(ITEMS)
    file = folder / "mine.yaml"
    file.write_text(DEFINITION.format(items=folder / "items.jsonl", text=text) + more)
    return file


def settings(folder: Path, name: str = "mine", trusted: bool = False) -> ZeroShotSettings:
    return ZeroShotSettings((name,), include_path=folder, limit=4, trusted=trusted)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Plant code beside the definitions that leaves a trace if it runs."""
    (tmp_path / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef text(doc):\n    return doc['word']\n"
    )
    return tmp_path


SLOW = [
    pytest.param(where, marks=pytest.mark.slow) for where in ("a group's member", "a path")
]  # all of lm-eval's are read


@pytest.mark.parametrize("where", ["itself", "an included file", *SLOW])
def test_code_of_a_definition_runs_only_where_the_user_trusts_it(planted: Path, where: str) -> None:
    name = "mine"
    file = define(planted, "!function own.text")
    if where == "an included file":
        file.rename(planted / "part.inc")
        file.write_text("include: part.inc\ntask: mine\n")
    elif where == "a group's member":
        (planted / "several.yaml").write_text("group: several\ntask: [mine]\n")
        name = "several"
    elif where == "a path":
        name = str(file)
    with pytest.raises(
        BadInput, match=r"(mine\.yaml|part\.inc) runs code: !function own\.text; read it.*trust_tasks=True"
    ):
        find_tasks(settings(planted, name))
    assert not (planted / "ran").exists()
    assert find_tasks(settings(planted, name, trusted=True))["tasks"]
    assert (planted / "ran").exists()


def test_a_definition_without_code_beside_one_with_code_needs_no_trust(planted: Path) -> None:
    define(planted, "!function own.text").rename(planted / "other.yaml")
    other = planted / "other.yaml"
    other.write_text(other.read_text().replace("task: mine", "task: other"))
    define(planted)
    assert [*find_tasks(settings(planted))["tasks"]] == ["mine"]
    assert not (planted / "ran").exists()


def test_fit_asks_for_trust_too(planted: Path) -> None:
    file = define(planted, "!function own.text")
    with pytest.raises(BadInput, match=r"mine\.yaml runs code") as refused:
        read_task(str(file))
    assert refused.value.field == "task"
    assert not (planted / "ran").exists()
    assert len(read_task(str(file), trusted=True).items) == 20


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("metric_list: [{metric: somebody/metric}]", "the metric somebody/metric"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "a metric that lm-eval loads from the Hub"),
        ('use_prompt: "promptsource:GPT-3 style"', "the prompt promptsource"),
    ],
)
def test_code_referenced_by_a_setting_is_detected(tmp_path: Path, more: str, said: str) -> None:
    define(tmp_path).with_name("part.inc").write_text(more)
    (tmp_path / "mine.yaml").write_text("include: part.inc\n" + (tmp_path / "mine.yaml").read_text())
    with pytest.raises(BadInput, match=said):
        find_tasks(settings(tmp_path))


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    reach = "cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "')"
    define(tmp_path, f'"{{{{ {reach} }}}}"')
    with pytest.raises(
        BadInput, match=r"a template of .*mine\.yaml cannot be rendered: access to attribute '__init__'"
    ):
        find_tasks(settings(tmp_path))
    with pytest.raises(BadInput, match="trust_tasks=True"):
        read_task(str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
        ("{{ 'x' * 10**11 }}", "memory"),
        ("{{ 'x' * 4 * 10**6 }}", "4,000,000 characters"),
    ],
)
def test_a_template_has_limits(tmp_path: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 1)
    harness_trust._CHILDREN.clear()  # one of an earlier test has a limit of ten seconds
    define(tmp_path, f'"{template}"')
    with pytest.raises(BadInput, match=said):
        find_tasks(settings(tmp_path))


def test_a_definition_gives_the_same_results_in_the_sandbox(tmp_path: Path) -> None:
    define(tmp_path, "\"{{ word | regex_replace('w', 'w1') }}\\n\"")
    model, tokenizer = pico_model("llama"), pico_tokenizer()
    plain, apart = (zero_shot(model, tokenizer, settings(tmp_path, trusted=own)) for own in (True, False))
    assert plain == apart


def test_definitions_of_coprune_need_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_DATA", str(word_items(tmp_path)))
    assert find_tasks(ZeroShotSettings(("piqa",), include_path=DEFINITIONS))["tasks"]
