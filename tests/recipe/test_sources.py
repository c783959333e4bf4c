"""What a model is calibrated on, as it is written, and how many samples each source gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.recipe.recipe import make_recipe
from coprune.recipe.sources import Source, counts_of, split_sources


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("wikitext2", [Source("wikitext2", 1.0)]),
        ("owner/name:config:column", [Source("owner/name:config:column", 1.0)]),
        ("self", [Source("self", 1.0)]),
        ("self,c4", [Source("self", 0.5), Source("c4", 0.5)]),
        ("self=0.5, c4=0.5", [Source("self", 0.5), Source("c4", 0.5)]),
        (
            "chat.jsonl:seqlen=512=0.3,wikitext2=0.7",
            [Source("chat.jsonl", 0.3, {"seqlen": 512}), Source("wikitext2", 0.7)],
        ),
        (
            "self:a.jsonl:temperature=0.8,top_p=0.9=0.25,chat.jsonl:template=chat,column=talk=0.75",
            [
                Source("self:a.jsonl", 0.25, {"temperature": 0.8, "top_p": 0.9}),
                Source("chat.jsonl", 0.75, {"template": "chat", "column": "talk"}),
            ],
        ),
    ],
)
def test_sources_are_read(data: str, expected: list[Source]) -> None:
    assert split_sources(data) == expected


def test_what_exists_is_a_name_whatever_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "a=1,b=2.txt"
    file.write_text("words")
    assert split_sources(str(file)) == [Source(str(file), 1.0)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("self=0.5,c4=0.3", "the shares add up to 0.8, not to 1"),
        ("self=0.5,c4", "c4 has no share, and others have"),
        ("self=much,c4=0.5", "the share of self is a number above 0, up to 1, not 'much'"),
        ("self,,c4", "'' names no source"),
        ("self,self", "the source self is named twice"),
        ("c4:temperature=1", "temperature is an option of self, and c4 is not written by the model"),
        ("self:temperature=hot", "temperature of self is a number of at least 0, not 'hot'"),
        ("self:length=1.5", "length of self is a whole number of at least 1, not '1.5'"),
        ("c4:seqlen=1", "seqlen of c4 is a whole number of at least 2, not '1'"),
        ("c4:seqlen=8,seqlen=9", "seqlen of c4 is given twice"),
        ("a.jsonl:template=talk", "template of a.jsonl is chat or none, not 'talk'"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_loaded(data: str, message: str) -> None:
    with pytest.raises(BadInput) as raised:
        make_recipe({"model": "nowhere", "dataset": data})
    assert message in str(raised.value)
    assert raised.value.field == "dataset"


def test_samples_go_to_the_largest_remainders() -> None:
    assert counts_of([0.5, 0.3, 0.2], 128) == [64, 38, 26]
    assert counts_of([1 / 3] * 3, 128) == [43, 43, 42]
    assert counts_of([0.9, 0.1], 4) == [4, 0]
    assert counts_of([1.0], 7) == [7]
    for samples in range(1, 40):
        assert sum(counts_of([0.17, 0.33, 0.5], samples)) == samples


def test_a_mapping_is_written_in_one_line() -> None:
    recipe = make_recipe({"model": "m", "dataset": {"self": 0.5, "embedded": 0.5}})
    assert recipe.calibrate.data == "self=0.5,embedded=0.5"
    with pytest.raises(BadInput, match="has to be in memory"):
        make_recipe({"model": "m", "dataset": "self,embedded", "stream": True})
