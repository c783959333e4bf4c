"""Sources of images, sampling and labels, and accuracy."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy.stats import binomtest
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.data.images import LabelledImages, draw_images, image_batches, labelled_images, labels_for
from coprune.evaluation.accuracy import aggregate_accuracy, rank_classes, wilson_interval


def grey(value: int) -> Pillow.Image:
    return Pillow.new("L", (6, 4), value)


def brightness(images: Sequence[Pillow.Image]) -> Tensor:
    """Transform each image to a single number."""
    return torch.tensor([[[[image.getpixel((0, 0))[0]]]] for image in images], dtype=torch.float32)  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, offset in (("train", 0), ("val", 100)):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(3):
                grey(offset + 10 * number + i).save(place / f"{i}.png")
    return tmp_path


def test_a_folder_of_classes_with_parts(folder: Path) -> None:
    train, val = labelled_images(str(folder), "calibration"), labelled_images(str(folder), "evaluation")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [train.image(i).getpixel((0, 0))[0] for i in range(6)] == [0, 1, 2, 10, 11, 12]
    assert val.image(5).getpixel((0, 0)) == (112, 112, 112)


def test_a_folder_without_splits_is_used_for_calibration_and_evaluation(folder: Path) -> None:
    found = [labelled_images(str(folder / "val"), part) for part in ("calibration", "evaluation")]
    assert found[0].labels.tolist() == found[1].labels.tolist()


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_with_images(tmp_path: Path, typed: bool) -> None:
    def encoded(value: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        grey(value).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = {"image": [encoded(v) for v in (5, 6, 7)], "label": [1, 0, 1]}
    kinds = Features(image=Image(), label=ClassLabel(names=["no", "yes"]))
    plain = Features(image={"bytes": Value("binary"), "path": Value("string")}, label=Value("int64"))
    Dataset.from_dict(rows, features=kinds if typed else plain).to_parquet(tmp_path / "some.parquet")
    images = labelled_images(str(tmp_path / "some.parquet"), "calibration", tmp_path / "cache")
    assert images.labels.tolist() == [1, 0, 1]
    assert images.image(2).getpixel((0, 0)) == (7, 7, 7)
    assert images.classes == (("no", "yes") if typed else ())


def test_the_digits_are_split_without_overlap() -> None:
    train, test = labelled_images("digits", "calibration"), labelled_images("digits", "evaluation")
    assert len(train) + len(test) == 1797
    seen = {train.image(i).tobytes() for i in range(len(train))}
    assert sum(test.image(i).tobytes() in seen for i in range(len(test))) == 0
    assert sorted(set(test.labels.tolist())) == list(range(10))


@settings(deadline=None, max_examples=15)
@given(nsamples=st.integers(1, 40), seed=st.integers(0, 5))
def test_samples_are_drawn_without_repetition_and_by_the_seed(nsamples: int, seed: int) -> None:
    images = labelled_images("digits", "calibration").first(40)

    def number(pictures: Sequence[Pillow.Image]) -> Tensor:
        return torch.tensor([[[[hash(picture.tobytes()) % 2**20]]] for picture in pictures], dtype=torch.float32)

    drawn, again = (draw_images(images, number, nsamples, seed) for _ in range(2))
    assert drawn.fingerprint == again.fingerprint
    assert len(set(drawn.tokens.flatten().tolist())) == nsamples


def test_too_few_images_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="6 images, fewer than the 7"):
        draw_images(labelled_images(str(folder), "calibration"), brightness, 7, 0)


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "./nothing"])
def test_missing_image_files_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="there is no file or folder"):
        labelled_images(name, "calibration")


def test_batches_hold_every_image_once_in_order(folder: Path) -> None:
    images = labelled_images(str(folder), "calibration")
    batches = list(image_batches(images, brightness, 4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert torch.cat([pixels for pixels, _ in batches]).flatten().tolist() == [0, 1, 2, 10, 11, 12]


def test_labels_are_matched_by_the_models_class_names(folder: Path) -> None:
    images = labelled_images(str(folder), "calibration")
    assert labels_for(images, {0: "dog", 1: "bird", 2: "cat"}, 3).tolist() == [2, 2, 2, 0, 0, 0]
    assert labels_for(images, {0: "LABEL_0", 1: "LABEL_1"}, 2).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(BadInput, match="only 1 classes"):
        labels_for(images, {0: "LABEL_0"}, 1)


def test_classes_with_the_same_name_are_matched_by_number() -> None:
    images = LabelledImages(grey, torch.tensor([0, 1, 2]), ("crane", "dog", "cat"), "three")
    assert labels_for(images, {0: "crane", 1: "dog", 2: "cat", 3: "crane"}, 4).tolist() == [0, 1, 2]


def test_the_first_images_are_spread_over_the_folder(folder: Path) -> None:
    images = labelled_images(str(folder), "calibration").first(3)
    assert [images.image(i).getpixel((0, 0))[0] for i in range(3)] == [0, 2, 11]
    assert images.labels.tolist() == [0, 0, 1]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 500), data=st.data())
def test_wilsons_interval(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_top1_and_top5() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 8
    found = aggregate_accuracy(rank_classes(logits), labels)
    order = logits.argsort(dim=1, descending=True)
    assert found.top1 == pytest.approx(float((order[:, 0] == labels).float().mean()))
    assert found.top5 == pytest.approx(float((order[:, :5] == labels[:, None]).any(dim=1).float().mean()))
    assert found.images == 50


def _parquet(folder: Path, images: Sequence[Any], labels: Sequence[Any], label: Any = None) -> Path:
    """Write a file of images (shades of grey, or other contents) with labels of a type."""

    def encoded(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, int):
            return None if value is None else {"bytes": value, "path": None}
        buffer = io.BytesIO()
        grey(value).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    kinds = None if label is None else Features(image=Image(), label=label)
    rows = {"image": [encoded(value) for value in images], "label": list(labels)}
    Dataset.from_dict(rows, features=kinds).to_parquet(folder / "some.parquet")
    return folder / "some.parquet"


@pytest.mark.parametrize("kind", [ClassLabel(names=["cat", "dog"]), Value("int64")])
@pytest.mark.parametrize("missing", [-1, None])
def test_images_without_a_label_calibrate_but_are_not_measured_on(tmp_path: Path, kind: Any, missing: Any) -> None:
    file = _parquet(tmp_path, [5, 6, 7], [1, missing, 0], kind)
    images = labelled_images(str(file), "calibration", tmp_path / "cache")
    assert images.labels.tolist() == [1, -1, 0]
    assert len(draw_images(images, brightness, 3, 0).tokens) == 3
    with pytest.raises(BadInput, match=r"1 of the 3 images of .* have no label"):
        labels_for(images, {0: "cat", 1: "dog"}, 2)


def test_labels_that_are_words_are_classes(tmp_path: Path) -> None:
    file = _parquet(tmp_path, [5, 6, 7], ["dog", "cat", "dog"], Value("string"))
    images = labelled_images(str(file), "calibration", tmp_path / "cache")
    assert images.classes == ("cat", "dog")
    assert labels_for(images, {0: "dog", 1: "bird", 2: "cat"}, 3).tolist() == [0, 2, 0]


@pytest.mark.parametrize("label", [0.5, float("nan")])
def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path, label: float) -> None:
    file = _parquet(tmp_path, [5, 6], [1.0, label])
    with pytest.raises(BadInput, match="neither a whole number nor a word"):
        labelled_images(str(file), "calibration", tmp_path / "cache")


@pytest.mark.parametrize("broken", [b"no image", None])
def test_a_broken_image_of_a_dataset_is_named(tmp_path: Path, broken: bytes | None) -> None:
    images = labelled_images(
        str(_parquet(tmp_path, [5, broken], [0, 1], Value("int64"))), "calibration", tmp_path / "c"
    )
    assert images.image(0).getpixel((0, 0)) == (5, 5, 5)
    with pytest.raises(BadInput, match=r"image 1 of .*some\.parquet cannot be read as an image"):
        images.image(1)


def test_a_broken_image_of_a_folder_is_named(folder: Path) -> None:
    whole = (folder / "val" / "cat" / "1.png").read_bytes()
    (folder / "val" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    images = labelled_images(str(folder / "val"), "evaluation")
    with pytest.raises(BadInput, match=r"cat/1\.png cannot be read as an image"):
        images.image(1)
