"""Speech recognition models: calibrated on recordings, measured by word errors, and other input refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from transformers import AutoModelForSpeechSeq2Seq

import coprune
from coprune.base.errors import BadInput
from coprune.data.speech import read_recordings, waveform, word_errors
from support.pico_folder import save_pico, write_words
from support.pico_pairs import save_pair_model, write_recordings

PRUNING: dict[str, Any] = dict(nsamples=4, quiet=True, layer_error=False, sparsity=0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    save_pair_model(folder / "model", "Whisper")
    write_recordings(folder / "heard")
    write_words(folder / "words.txt")
    return folder


def test_a_speech_model_is_calibrated_and_measured_on_recordings(place: Path, tmp_path: Path) -> None:
    heard: dict[str, Any] = {"dataset": place / "heard", "eval_data": place / "heard"}
    report = coprune.prune(
        place / "model", "wanda", save_model=tmp_path / "pruned", require="alike>=0,word_error<0", **heard, **PRUNING
    ).report
    assert [one.holds for one in report.required] == [True, False]
    (found,) = report.transcripts
    assert (found.recordings, len(report.matrices)) == (4, 32)
    assert report.calibration is not None
    assert "the dense model's transcripts" in report.calibration.source
    compared = coprune.evaluate(tmp_path / "pruned", place / "heard", against=place / "model", quiet=True)
    assert compared.near == (found.model_copy(update={"data": str(place / "heard")}),)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "pruned")
    zeros = [(p == 0).float().mean().item() for name, p in model.named_parameters() if name.endswith("fc1.weight")]
    assert zeros == pytest.approx([0.5] * 4)


def test_other_input_is_refused_in_one_line(place: Path) -> None:
    with pytest.raises(BadInput, match=r"words\.txt is not a folder of recordings, but the model transcribes speech"):
        coprune.prune(place / "model", "wanda", dataset=place / "words.txt", **PRUNING)
    text = save_pico(place / "llama")
    with pytest.raises(BadInput, match="heard holds recordings, but text is expected"):
        coprune.prune(text, "wanda", dataset=place / "heard", seqlen=8, **PRUNING)
    with pytest.raises(BadInput, match=r"0\.wav is a recording, but text is expected"):
        coprune.evaluate(text, place / "heard" / "0.wav", quiet=True)


def test_recordings_are_read_at_the_models_rate(place: Path, tmp_path: Path) -> None:
    wave = np.sin(np.arange(8000) / 20).astype(np.float32)
    wavfile.write(tmp_path / "stereo.wav", 8000, np.stack([wave, wave], axis=1))
    wavfile.write(tmp_path / "bytes.wav", 8000, ((wave + 1) * 127).astype(np.uint8))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bytes.wav", "transcription": "a b"}\n')
    rows = read_recordings(str(tmp_path)).rows
    assert [(row.file.name, row.said) for row in rows] == [("bytes.wav", "a b"), ("stereo.wav", None)]
    for row in rows:
        read = torch.from_numpy(waveform(row.file, 16000))
        assert len(read) == 16000
        assert (read[100:-100:2] - torch.from_numpy(wave)[50:-50]).abs().max() < 0.02


def crafted_wav(file: Path, channels: int = 1, rate: int = 8000, bits: int = 16, seconds: float = 0.1) -> Path:
    """Write a WAV file of silence with these values in its header."""
    wide = max(1, channels * bits // 8)
    size = int(seconds * max(1, rate)) * wide
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * wide) % (1 << 32), wide, bits)
    file.write_bytes(
        b"RIFF"
        + struct.pack("<I", 36 + size)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", size)
    )
    with file.open("r+b") as stream:
        stream.truncate(44 + size)
    return file


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": 0}, "channels cannot be 0"),
        ({"channels": 3000, "seconds": 0.001}, "channels cannot be 3000"),
        ({"rate": 0}, "rate cannot be 0"),
        ({"rate": 1}, "rate cannot be 1"),
        ({"rate": 4_000_000_000, "seconds": 1e-6}, "rate cannot be 4000000000"),
        ({"bits": 0}, "bits cannot be 0"),
        ({"bits": 13}, "bits cannot be 13"),
        ({"rate": 1000, "bits": 8, "seconds": 4000}, "holds 4,000 seconds of sound, more than the limit of 3,600"),
    ],
)
def test_meaningless_headers_are_refused_before_any_work(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    crafted_wav(tmp_path / "a.wav", **changes)
    with pytest.raises(BadInput, match=f"a.wav.*{told}"):
        read_recordings(str(tmp_path))
    with pytest.raises(BadInput, match=told):
        waveform(tmp_path / "a.wav", 16000)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"RIFF\0\0\0\0WAVEfmt ", b"RIFF\0\0\0\0WAVE", b"noise" * 20])
def test_a_file_that_is_not_wav_is_one_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.wav"):
        read_recordings(str(tmp_path))


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [("a b c", "a b c", 0), ("A, b c!", "a b", 1), ("a b", "a x b y", 2), ("a b", "", 2), ("", "a", 1)],
)
def test_word_errors_count_inserted_deleted_and_substituted_words(said: str, heard: str, errors: int) -> None:
    assert word_errors(said, heard)[0] == errors
