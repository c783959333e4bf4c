"""Prompts: built-in ones, those of a file, and their tokenisation."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.evaluation.answers.questions import BUILTIN, plan_of, questions_for, read_prompts, short_prompts
from coprune.recipe.answers import AnswersPart
from support.pico import pico_model
from support.pico_folder import pico_tokenizer

pytestmark = pytest.mark.usefixtures("whole_answers")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico_model("llama", max_position_embeddings=128)


def test_builtin_prompts_cover_several_scripts() -> None:
    own = read_prompts(BUILTIN)
    assert len(own.texts) == len(set(own.texts)) >= 36
    written = {unicodedata.name(letter).split()[0] for letter in "".join(own.texts) if letter.isalpha()}
    assert {"LATIN", "CYRILLIC", "CJK", "ARABIC", "DEVANAGARI"} <= written
    assert len(short_prompts().texts) == 16
    assert set(short_prompts().texts) < set(own.texts)


def test_a_file_of_prompts_and_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{number} \u2028", "question": f"w{number + 100}"} for number in range(10)]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_prompts(str(file)).texts == tuple(row["prompt"] for row in rows)
    assert read_prompts(f"{file}:question", 3).texts == ("w100", "w103", "w106")
    assert read_prompts(str(file)).fingerprint != read_prompts(f"{file}:question").fingerprint
    file.write_text('{"prompt": 3}')
    with pytest.raises(BadInput, match="no text in the column 'prompt'"):
        read_prompts(str(file))
    asked = {"role": "user", "content": "w5"}
    file.write_text(json.dumps({"messages": [asked, {"role": "assistant", "content": "w6"}]}))
    assert read_prompts(str(file)).texts == ("w5",)
    file.write_text(json.dumps({"messages": [asked, {"role": "assistant", "content": "w6"}, asked]}))
    with pytest.raises(BadInput, match=r"row 1 of .* is a conversation of several turns") as raised:
        read_prompts(str(file))
    assert raised.value.field == "generate"


def test_prompts_go_into_the_chat_template_of_a_tokenizer_that_has_one(tmp_path: Path, model: PreTrainedModel) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5 w6"}')
    plan = plan_of(AnswersPart(prompts=str(tmp_path / "p.jsonl"), new_tokens=8), saves=False)
    assert plan is not None
    tokenizer = pico_tokenizer("put")
    plain = questions_for(plan, tokenizer, model)
    assert plain.ids == ((1, 5, 6),)
    assert not plain.asked.chat
    tokenizer.chat_template = "<s> w9 {% for message in messages %}{{ message['content'] }} {% endfor %}w10"
    chat = questions_for(plan, tokenizer, model)
    assert chat.ids == ((1, 9, 5, 6, 10),)
    assert chat.asked.chat
    assert chat.ends == (2,)


def test_default_generation_shortens_its_answers_to_the_context(model: PreTrainedModel) -> None:
    tokenizer = pico_tokenizer()
    few = plan_of(AnswersPart(), saves=True)
    assert few is not None
    assert plan_of(AnswersPart(), saves=False) is plan_of(AnswersPart(gate=False), saves=True) is None
    longest = max(len(ids) for ids in questions_for(few, tokenizer, model).ids)
    assert questions_for(few, tokenizer, model).new_tokens == 64
    small = pico_model("llama", max_position_embeddings=longest + 30, num_hidden_layers=1)
    assert questions_for(few, tokenizer, small).new_tokens == 30
    asked = plan_of(AnswersPart(require="loops<3"), saves=False)
    assert asked is not None
    with pytest.raises(BadInput, match=rf"exceeds the model's limit of {longest + 30} positions"):
        questions_for(asked, tokenizer, small)
