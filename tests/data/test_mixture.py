"""Conversations in the chat template, masks of generated tokens, and samples of several sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import ByteLevel as ByteLevelOffsets
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from coprune.base.errors import BadInput
from coprune.data.conversations import holds_conversations, messages_of, read_conversations, read_prompts
from coprune.data.mixture import mixed, packed, source_windows
from coprune.data.windows import Sampling
from coprune.recipe.sources import Source
from support.pico_folder import pico_tokenizer, write_words

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w7', 'assistant': 'w8'}[m['role']] }} {{ m['content'] }} w9 {% endfor %}"
    "{% if add_generation_prompt %}w8 {% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "w20 w21"}, {"role": "assistant", "content": "w40"}]},
    {"conversations": [{"from": "human", "value": "w20 w21"}, {"from": "gpt", "value": "w40"}]},
    {"instruction": "w20", "input": "w21", "output": "w40"},
    {"prompt": "w20 w21", "answer": "w40"},
    {"prompt_ids": [7, 20, 21, 9, 8], "answer_ids": [40, 9], "answer": "w40 w9"},
]
IDS, GENERATED = [7, 20, 21, 9, 8, 40, 9], [False] * 5 + [True] * 2


def tokenizer() -> Any:
    made = pico_tokenizer("known")
    made.chat_template = TEMPLATE
    return made


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", ROWS, ids=[next(iter(row)) for row in ROWS])
def test_every_format_is_the_same_conversation(row: dict[str, Any], tmp_path: Path) -> None:
    name = write(tmp_path / "chat.jsonl", row)
    assert holds_conversations(name)
    assert read_conversations(name, tokenizer()) == [(IDS, GENERATED)]


def test_every_answer_of_a_long_conversation_is_marked(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w40 w41"}] * 2
    [document] = read_conversations(write(tmp_path / "chat.jsonl", {"talk": said}), tokenizer(), "talk")
    assert document.ids == [7, 20, 9, 8, 40, 41, 9] * 2
    assert document.generated == [False, False, False, False, True, True, True] * 2


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Light scatters 🌍."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "It is late."},
]
TURNS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ between }}{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ between }}{% endif %}"
)


def trained(kind: str, between: str, slow: bool = False) -> Any:
    """Train a small BPE tokenizer of a kind, with special tokens that mark turns."""
    inner = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    if kind == "byte-level":
        inner.pre_tokenizer, inner.post_processor = ByteLevel(add_prefix_space=False), ByteLevelOffsets()
        inner.decoder = ByteLevelDecoder()
    elif kind == "metaspace":
        inner.pre_tokenizer = Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = Normalizers([Prepend("▁"), Replace(" ", "▁")])
    if inner.decoder is None:
        inner.decoder = MetaspaceDecoder(prepend_scheme="never")
    marks, alphabet = ["<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<end>"], ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=[*alphabet, "\n"], show_progress=False)
    inner.train_from_iterator([message["content"] for message in CHAT] * 3, trainer)
    kind_of: Any = _Slow if slow else PreTrainedTokenizerFast
    made = kind_of(tokenizer_object=inner, unk_token="<unk>")
    made.chat_template = TURNS.replace("{{ between }}", between)
    return made


class _Slow(PreTrainedTokenizerFast):
    """A tokenizer that gives no offsets."""

    is_fast = False

    def __call__(self, *given: Any, **options: Any) -> Any:
        assert not options.get("return_offsets_mapping")
        return super().__call__(*given, **options)


@pytest.mark.parametrize("between", ["\n", "", " "])
@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend"])
def test_a_conversation_has_the_tokens_of_its_template(kind: str, between: str, tmp_path: Path) -> None:
    made = trained(kind, between)
    [document] = read_conversations(write(tmp_path / "chat.jsonl", {"messages": CHAT}), made)
    assert document.ids == made.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    written = [token for token, mark in zip(document.ids, document.generated, strict=True) if mark]
    said = [text.strip() for text in made.decode(written).split("<end>")]
    assert said == ["Light scatters 🌍.", "It is late.", ""]


def test_a_slow_tokenizer_marks_answers_only_if_pieces_tokenise_alike(tmp_path: Path) -> None:
    name = write(tmp_path / "chat.jsonl", {"messages": CHAT})
    fast, slow = (trained("byte-level", "\n", slow) for slow in (False, True))
    assert read_conversations(name, slow) == read_conversations(name, fast)
    with pytest.raises(BadInput, match=r"cannot find the assistant's tokens in row 1 of .*: _Slow"):
        read_conversations(name, trained("prepend", "\n", slow=True))


@pytest.mark.parametrize("row", ROWS[:4], ids=[next(iter(row)) for row in ROWS[:4]])
def test_a_system_column_becomes_the_first_message(row: dict[str, Any]) -> None:
    plain, said = messages_of(row), messages_of(row | {"system": "Be kind."})
    assert plain is not None
    assert said == [CHAT[0], *plain]
    assert messages_of({"messages": said, "system": "Be kind."}) == said
    assert messages_of(row | {"system": None}) == plain


def test_text_and_other_rows_are_not_conversations(tmp_path: Path) -> None:
    assert not holds_conversations(write(tmp_path / "a.jsonl", {"text": "w5", "prompt": "w5", "answer": "w6"}))
    assert not holds_conversations(write(tmp_path / "b.jsonl", {"title": "w5"}))
    with pytest.raises(BadInput, match=r"row 1 of .* is not a conversation: its columns are 'title'"):
        read_conversations(str(tmp_path / "b.jsonl"), tokenizer())


def test_template_errors_are_reported(tmp_path: Path) -> None:
    name, plain, broken = write(tmp_path / "chat.jsonl", ROWS[0]), pico_tokenizer(), tokenizer()
    with pytest.raises(BadInput, match="the tokenizer has no chat template, which row 1 of"):
        read_conversations(name, plain)
    broken.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadInput, match=r"chat template fails on row 1 of .*: roles must alternate"):
        read_conversations(name, broken)
    with pytest.raises(BadInput, match="has ids of another tokenizer"):
        read_conversations(write(tmp_path / "ids.jsonl", {**ROWS[4], "answer": "w41"}), tokenizer())


@pytest.mark.parametrize("ids", [5, "5", [5.0], [True], [-1], [10**30], None])
def test_invalid_token_ids_are_reported_with_their_row(ids: Any, tmp_path: Path) -> None:
    file = tmp_path / "ids.jsonl"
    write(file, ROWS[4])
    file.write_text(file.read_text() + json.dumps(ROWS[4] | {"answer_ids": ids}) + "\n")
    with pytest.raises(BadInput, match=r"row 2 of .* (holds token ids that are not integers|is not a conversation)"):
        read_conversations(str(file), tokenizer())


def test_prompts_are_read_from_a_column_or_a_conversation(tmp_path: Path) -> None:
    name = write(tmp_path / "p.jsonl", {"prompt": "w20"}, ROWS[0])
    assert read_prompts(name) == ["w20", [{"role": "user", "content": "w20 w21"}]]
    with pytest.raises(BadInput, match=r"row 1 of .* has no column 'question', only 'prompt'"):
        read_prompts(name, "question")


def test_documents_are_cut_into_full_samples(tmp_path: Path) -> None:
    documents = read_conversations(write(tmp_path / "chat.jsonl", *ROWS[:3]), tokenizer())
    windows = packed(documents, 4, 5, None, "them")
    assert windows.tokens.tolist() == torch.tensor(IDS * 3)[:20].view(4, 5).tolist()
    assert windows.generated is not None
    assert windows.generated.tolist() == torch.tensor(GENERATED * 3)[:20].view(4, 5).tolist()
    with pytest.raises(BadInput, match="them has 21 tokens, but 5 samples of 5 need 25"):
        packed(documents, 5, 5, 0, "them")


def test_a_mixture_holds_each_sources_samples(tmp_path: Path) -> None:
    write_words(tmp_path / "words.txt")
    chat, words = Source(write(tmp_path / "chat.jsonl", *ROWS[:4] * 3), 0.5), Source(str(tmp_path / "words.txt"), 0.5)
    both = (tokenizer(), tokenizer())
    found = [(source, source_windows(source, both, Sampling(4, 6, 0))) for source in (chat, words)]
    windows = mixed(found, 0)
    rows = sorted(map(tuple, torch.cat([one.tokens for _, one in found]).tolist()))
    assert sorted(map(tuple, windows.tokens.tolist())) == rows
    assert [(part.name, part.nsamples) for part in windows.parts] == [(chat.name, 4), (words.name, 4)]
    assert [part.fingerprint for part in windows.parts] == [one.fingerprint for _, one in found]
    # Unmarked text counts completely; masks stay with their tokens.
    assert windows.generated is not None
    marks = dict(zip(map(tuple, windows.tokens.tolist()), windows.generated.tolist(), strict=True))
    for row in found[1][1].tokens.tolist():
        assert all(marks[tuple(row)])
    assert found[0][1].generated is not None
    for row, generated in zip(found[0][1].tokens.tolist(), found[0][1].generated.tolist(), strict=True):
        assert marks[tuple(row)] == generated
    assert torch.equal(mixed(found[:1], 5).tokens, found[0][1].tokens)
