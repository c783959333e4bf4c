"""llm-compressor as its users type it: load a folder, prune it, save it, load what was saved.

python benchmarks/speed_llm_compressor.py MODEL TOKENS.safetensors wanda 2:4 OUT
"""

import sys

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

name, tokens, method, pattern, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
samples = load_file(tokens)["tokens"]
data = Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": samples.new_ones(samples.shape).tolist()})
modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=data,
    recipe=[modifier(sparsity=0.5, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"])],
    num_calibration_samples=len(samples),
    max_seq_length=samples.shape[1],
)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
AutoModelForCausalLM.from_pretrained(out, dtype="auto")
