"""Ollama's Modelfile: its Go template renders like the model's Jinja template, or it is not written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coprune.gguf_files.modelfile import Messages, modelfile_of, turns_of
from support.commands import run_command
from support.pico import pico_model
from support.pico_gguf import write_pico_gguf

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for message in messages %}{% set content = '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + "
    "'<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
RENAMED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}{{ '<turn>' + role + '\n' + "
    "message['content'] + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
FOLDED = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + (messages[0]['content'] if loop.last else '')"
    " + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
TALKS: list[Messages] = [
    [{"role": "user", "content": "one"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "again"}],
]
BRIEFED: Messages = [{"role": "system", "content": "short"}, *TALKS[1]]


def go(template: str, messages: Messages) -> str:
    """Run a Go template of range, if, else if, not and eq over Ollama's names."""
    system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
    pieces = re.split(r"\{\{ (.*?) \}\}", template)

    def until(at: int, message: dict[str, str], shown: bool) -> tuple[str, int]:
        text = ""
        while at < len(pieces):
            if at % 2 == 0:
                text += pieces[at] if shown else ""
                at += 1
                continue
            word = pieces[at]
            if word == "end" or word.startswith("else if"):
                return text, at
            if word == "range .Messages":
                for one in messages:
                    inner, end = until(at + 1, dict(one), shown)
                    text += inner
                at = end + 1
            elif word == ".Content":
                text, at = text + (message["content"] if shown else ""), at + 1
            else:
                done = False
                while word != "end":
                    holds = not done and (
                        not system if word == "if not .System" else word.endswith(f'.Role "{message["role"]}"')
                    )
                    done = done or holds
                    inner, at = until(at + 1, message, shown and holds)
                    text, word = text + inner, pieces[at]
                at += 1
        return text, at

    return until(0, {}, True)[0]


def jinja(template: str, messages: Messages) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **SPECIAL)
    return text.removeprefix("<s>")


@pytest.mark.parametrize("template", [CHATML, HEADERS, RENAMED])
def test_both_templates_render_the_same_text(template: str) -> None:
    turns = turns_of(template, SPECIAL, "<s>")
    assert turns is not None
    assert ("system" in turns.around) == (template is not RENAMED)
    for talk in TALKS if template is RENAMED else [*TALKS, BRIEFED]:
        assert go(turns.in_go(), talk) == jinja(template, talk)


def test_a_template_that_does_more_than_wrap_messages_is_not_written() -> None:
    assert turns_of(FOLDED, SPECIAL, "<s>") is None
    assert turns_of("{{ nothing['there'] }}", SPECIAL, "<s>") is None
    assert turns_of("{% broken", SPECIAL, "<s>") is None
    assert turns_of(CHATML.replace("You help", "{{"), SPECIAL, "<s>") is None


def test_a_template_that_takes_too_much_memory_is_not_written() -> None:
    assert turns_of("{{ ('x' * 10**10) | length }}", SPECIAL, "<s>") is None


def write(file: Path, template: str | None) -> Path:
    writer = GGUFWriter(file, "llama")
    writer.add_token_list(["<s>", "</s>", "<|eot|>", "a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 2)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_stop_tokens_and_template_come_from_the_file(tmp_path: Path) -> None:
    told = modelfile_of(write(tmp_path / "some.gguf", HEADERS)).text()
    assert told.startswith('FROM ./some.gguf\nTEMPLATE """{{ range .Messages }}')
    assert told.endswith('"""\nPARAMETER stop "</s>"\nPARAMETER stop "<|eot|>"\n')
    assert "<s>" not in told  # llama.cpp adds it
    assert 'TEMPLATE "' not in modelfile_of(write(tmp_path / "odd.gguf", FOLDED)).text()
    bare = modelfile_of(write(tmp_path / "bare.gguf", None)).text()
    assert bare.splitlines()[1] == "# No TEMPLATE: the file has no chat template, so Ollama continues plain text."


def test_the_command_writes_it_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pico_gguf(pico_model("llama"), tmp_path / "whole.gguf")
    monkeypatch.chdir(tmp_path)
    words = ["export", "whole.gguf", "out/small.gguf", "--type", "q8_0", "--modelfile"]
    ended = run_command(words, monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert (tmp_path / "out/Modelfile").read_text().startswith("FROM ./small.gguf\n")
    assert "modelfile out/Modelfile: no template" in ended.out
    (tmp_path / "out/small.gguf").unlink()
    ended = run_command(words, monkeypatch, capsys)
    assert ended.code == 2
    assert "out/Modelfile exists" in ended.err
