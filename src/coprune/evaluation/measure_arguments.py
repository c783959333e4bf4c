"""Arguments of `coprune.evaluate` and `coprune.compare` by name, as a type; a test keeps it equal to what they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict


class AnswerArguments(TypedDict, total=False):
    """Prompts, and how they are answered."""

    generate: str | Path | None
    """Let the models answer prompts, greedily and sampled, and measure loops, lengths and closeness to the dense
    model: builtin (of several fields and languages), or a .jsonl file with the column prompt (file:column for
    another)."""
    generate_prompts: int | None
    """Use only so many of the prompts. [all]"""
    generate_tokens: int
    """Most tokens of an answer."""
    generate_temperature: float
    """Temperature of the sampled answers; 0 for greedy ones alone."""


class MeasureArguments(AnswerArguments, total=False):
    """The measurements of a model, and how they are done."""

    require: str | None
    """Exit with 3, once all is saved, unless the answers, or what is measured, are so: conditions with commas between,
    such as 'loops<=dense+1,kl<0.5' or 'perplexity<=dense*1.05' (accuracy, word_error; cosine, overlap, alike with
    the dense model); no more answers may be empty than the dense model's unless that is said: empty<=dense+1."""
    tasks: str | Sequence[str] | None
    """Tasks of lm-eval, comma-separated, such as boolq,arc_easy."""
    eval_zero_shot: bool
    """The papers' seven tasks."""
    num_fewshot: int
    """Solved examples before every question."""
    include_path: str | Path | None
    """Folder with task definitions of your own (YAML); those that run code (`!function`) need --trust-tasks."""
    trust_tasks: bool
    """Let task definitions run the code that they name; read it first."""
    limit: int | None
    """Only the first so many items of each task. [all]"""
    apply_chat_template: bool
    """Put the tasks' prompts in the tokenizer's chat template."""
    gen_kwargs: str | None
    """How tasks that generate do so, as in max_gen_toks=64,do_sample=true,temperature=0.7."""
    log_samples: str | Path | None
    """Folder for every item of the tasks with the model's answer, a .jsonl file per model and task."""
    seqlen: int | None
    """Tokens per window. [min(2048, model's limit)]"""
    bos: Literal["auto", "first", "every", "never"]
    """Where the token that begins a text (BOS) stands, in calibration and perplexity: at the start of the text, of
    every window, or never; auto does as the tokenizer, unless it puts BOS and the dense model is clearly better (by
    5 % in perplexity, on a few windows) where every window has it."""
    batch_size: int | None
    """Windows per forward pass. [about 4096 tokens]"""
    eval_tokens: int | None
    """Use only so many tokens of each text. [all]"""
    eval_images: int | None
    """Use only so many images of each set. [all]"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."""
    device: str
    """auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    cache_dir: str | Path | None
    """Where downloads are kept. [the Hugging Face cache]"""
