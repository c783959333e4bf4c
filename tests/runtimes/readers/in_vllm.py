"""Read a folder with vLLM, on the CPU."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# In this process, to get its own error instead of a message that the engine ended.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import numpy as np
import vllm
from each import SOUND, each
from vllm import LLM, SamplingParams
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel


@contextmanager
def _loaded(folder: str, **options: Any) -> Iterator[LLM]:
    """Yield a model; free what it holds."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    try:
        yield LLM(
            model=folder,
            # Kernels for integer codes take no float32.
            dtype="float16" if "quantization_config" in config else "float32",
            enforce_eager=True,
            max_model_len=min(128, config.get("max_target_positions", 128)),
            max_num_seqs=4,
            disable_log_stats=True,
            **{"skip_tokenizer_init": True} | options,
        )
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
        gc.collect()


def _written(model: LLM, prompt: Any, new: int) -> dict[str, Any]:
    """Return the five largest log-probabilities of the next token and the tokens of a greedy continuation."""
    asked = SamplingParams(temperature=0.0, max_tokens=new, logprobs=5, ignore_eos=True, detokenize=False)
    answer = model.generate([prompt], asked, use_tqdm=False)[0].outputs[0]
    first = {token: one.logprob for token, one in answer.logprobs[0].items()}
    return {"values": first, "written": list(answer.token_ids)}


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Continue a text."""
    with _loaded(folder) as model:
        return _written(model, {"prompt_token_ids": tokens}, new)


def embed(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return the embedding of a text."""
    with _loaded(folder, runner="pooling", skip_tokenizer_init=False) as model:
        (found,) = model.embed([{"prompt_token_ids": tokens}], use_tqdm=False)
        return {"values": dict(enumerate(found.outputs.embedding)), "written": []}


def hear(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Transcribe a sound, after the given tokens."""
    heard = {"prompt": "", "multi_modal_data": {"audio": (np.array(SOUND, dtype=np.float32), 16000)}}
    with _loaded(folder, skip_tokenizer_init=False, max_num_batched_tokens=2048) as model:
        return _written(model, {"encoder_prompt": heard, "decoder_prompt": {"prompt_token_ids": tokens}}, new)


if __name__ == "__main__":
    reads = {"text": read, "embedding": embed, "speech": hear}
    # A model that is refused while it is built leaves the process groups undone, and every later one fails.
    each(reads, vllm.__version__, json.loads(sys.argv[1]), after_errors=False)
