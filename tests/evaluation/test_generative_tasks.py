"""Generative tasks from local files: upstream's numbers, its options, and logged items with answers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.evaluation.zero_shot import ZeroShotSettings
from support.commands import run_command
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, save, save_pico
from support.task_items import DEFINITIONS

pytest.importorskip("lm_eval")
from coprune.evaluation.harness import zero_shot

TEMPLATE = "{% for message in messages %}w9 {{ message['content'] }} {% endfor %}w10"
SHORT = "max_gen_toks=6,do_sample=false"


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write eight questions; the answers to the even ones are the numbers of the model's last words."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("TASK_DATA", str(folder))
    write(folder, ["0"] * 8)
    settings = asked(log_samples=tmp_path / "log")
    zero_shot(pico_model("llama"), pico_tokenizer(), settings)
    answers = [json.loads(line) for line in (tmp_path / "log" / "gsm8k.jsonl").read_text().splitlines()]
    written = {one["doc_id"]: one["filtered_resps"][0] for one in answers if one["filter"] == "flexible-extract"}
    write(folder, [written[number] if number % 2 == 0 else "-1" for number in range(8)])
    return folder


def write(folder: Path, answers: list[str]) -> None:
    rows = [{"question": f"w{20 + n} w{40 + n}", "answer": f"#### {answer}"} for n, answer in enumerate(answers)]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))


def asked(**changes: Any) -> ZeroShotSettings:
    return ZeroShotSettings(
        **{"tasks": ("gsm8k",), "include_path": DEFINITIONS, "batch_size": 4, "gen_kwargs": SHORT, **changes}
    )


def upstream(tokenizer: Any, chat: bool) -> dict[str, Any]:
    """Return the results of calling lm-eval directly."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = simple_evaluate(
            HFLM(pretrained=pico_model("llama"), tokenizer=tokenizer, batch_size=4, prefix_token_id=2),
            tasks=["gsm8k"],
            num_fewshot=0,
            gen_kwargs=SHORT,
            apply_chat_template=chat,
            task_manager=TaskManager(include_path=str(DEFINITIONS), include_defaults=False),
        )
    assert results is not None
    return results


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_numbers_are_those_of_calling_the_harness_directly(items: Path, chat: bool) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = "w2"  # upstream needs one of the tokenizer's own
    tokenizer.chat_template = TEMPLATE if chat else None
    (found,) = zero_shot(pico_model("llama"), tokenizer, asked(chat_template=chat)).tasks
    expected = upstream(tokenizer, chat)["results"]["gsm8k"]
    assert found.items == 8
    for name in ("strict-match", "flexible-extract"):
        estimate = found.metrics[f"exact_match ({name})"]
        assert estimate.value == pytest.approx(expected[f"exact_match,{name}"], abs=1e-12)
        assert estimate.stderr == pytest.approx(expected[f"exact_match_stderr,{name}"], abs=1e-12)
    if not chat:
        assert found.metrics["exact_match (flexible-extract)"].value == 0.5


def test_the_command_takes_the_options_and_writes_the_items(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pico(tmp_path / "plain")
    chatting = tmp_path / "chatting"
    save(pico_model("llama"), chatting)
    (chatting / "chat_template.jinja").write_text(TEMPLATE)
    command = ["--tasks", "gsm8k", "--include-path", str(DEFINITIONS), "--gen-kwargs", SHORT, "-q", "--limit", "2"]
    command += ["--apply-chat-template", "--log-samples", str(tmp_path / "samples")]
    ended = run_command(["eval", str(chatting), *command], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert "exact_match (flexible-extract)" in ended.out
    lines = (tmp_path / "samples" / "chatting" / "gsm8k.jsonl").read_text().splitlines()
    assert len(lines) == 4
    one = json.loads(lines[0])
    assert one["arguments"][0][0].startswith("w9 Question: w20")
    assert one["arguments"][0][1]["max_gen_toks"] == 6
    ended = run_command(["eval", str(tmp_path / "plain"), *command], monkeypatch, capsys)
    assert ended.code == 2
    assert "the tokenizer has no chat template; leave out --apply-chat-template" in ended.err


def test_generation_options_without_a_value_are_refused(items: Path) -> None:
    with pytest.raises(BadInput, match="the option 'temperature' of gen_kwargs has no value") as caught:
        zero_shot(pico_model("llama"), pico_tokenizer(), asked(gen_kwargs="temperature"))
    assert caught.value.field in ("gen_kwargs", "temperature")
