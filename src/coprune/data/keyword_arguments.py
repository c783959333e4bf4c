"""Keyword arguments of coprune's functions as types, for editors and type checkers.

`make keywords` writes this file from the settings of a recipe and the options of the methods; nobody edits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from coprune.data.in_memory import CalibrationData, TextData
from coprune.recipe.choice import Choice

File = str | Path
Named = str | Mapping[str, Any] | Choice
"""Something by name, perhaps with options: `owl:spread=0.1`, or `{"name": "owl", "spread": 0.1}`."""


class SharedArguments(TypedDict, total=False):
    """Settings that pruning, training and measuring share."""

    device: str
    """auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    cache_dir: File | None
    """Folder for downloads. [the Hugging Face cache]"""
    bos: Literal["auto", "first", "every", "never"]
    """Where the BOS token stands, in calibration and perplexity: at the start of the text, of every window, or never;
    auto follows the tokenizer, unless it adds BOS and the dense model is clearly better (by 5 % in perplexity, on a
    few windows) with BOS in every window."""
    eval_images: int | None
    """Maximum number of images per set, evenly spaced. [all]"""
    eval_tokens: int | None
    """Maximum number of tokens per text. [all]"""
    generate: File | None
    """Answer prompts and compare with the dense model: builtin or a .jsonl file. builtin has several fields and
    languages; a file has the column prompt (file:column for another). Both models answer greedily and sampled;
    loops, lengths and closeness are measured."""
    generate_prompts: int | None
    """Maximum number of prompts. [all]"""
    generate_tokens: int
    """Maximum tokens per answer."""
    generate_temperature: float
    """Temperature of the sampled answers; 0: only greedy ones."""
    require: str | None
    """Exit with 3 unless these hold: 'perplexity<=dense*1.05,loops<=dense+1'. Everything is saved first.
    Comma-separated conditions on measurements (perplexity, accuracy, word_error; cosine, overlap, alike with the
    dense model) or on answers ('loops<=dense+1,kl<0.5'). Empty answers may be no more than the dense model's,
    unless stated: empty<=dense+1."""


class RecipeArguments(SharedArguments, total=False):
    """The settings of a recipe, except the model and the method."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."""
    stream: bool | None
    """Read and write the model block by block, so that only one block is in memory at a time. [yes for checkpoint
    folders; a GGUF file is read whole]"""
    check_memory: bool
    """Refuse a run that would not fit in memory."""
    options: Mapping[str, bool | int | float | str | None]
    """Pruning method; coprune methods lists them."""
    pattern: str
    """unstructured, or N:M = N kept of every M inputs (2:4, 4:8, 1:4 …)."""
    sparsity: float | str | None
    """Fraction of zeros, 0 ≤ s < 1, or 50%; an N:M pattern sets it. [0.5]"""
    permute: bool
    """For N:M: permute channels first so that pruning loses less; the model's outputs stay the same. Loads the whole
    model into memory."""
    rotate: bool
    """Rotate the values of attention heads first so that pruning loses less; the model's outputs stay the same. Loads
    the whole model into memory."""
    include: str | Sequence[str]
    """Prune only matrices that match this pattern, e.g. '*.q_proj'; repeatable."""
    exclude: str | Sequence[str]
    """Do not prune matrices that match this pattern; repeatable."""
    allocation: Named
    """How the sparsity is allocated to the matrices: uniform, owl or fisher (options as in owl:spread=0.1), or a
    FILE.yaml of name patterns and sparsities; how removed channels and heads are allocated to the blocks: uniform
    or error."""
    refine: Named | Sequence[Named]
    """Improve the weights left by each mask: refit, swaps (which ends with a refit), options as in refit:rounds=10;
    repeatable."""
    reconstruct: int | str
    """Number of steps to train each pruned block toward the dense model's outputs."""
    reconstruct_tokens: int
    """With reconstruct: minimum number of tokens to train each block on; short samples get more steps, so that halving
    their length does not halve the training. [as many as the steps hold]"""
    reconstruct_lr: float | None
    """Learning rate of reconstruct, times the size (root mean square) of each matrix and vector, so that one rate
    serves models with smaller or larger weights. [the best by held-out error of the first blocks]"""
    reconstruct_dtype: Literal["float32", "bfloat16"]
    """Compute type while blocks are trained."""
    remove: str | Sequence[str]
    """Remove parts to make the model smaller: size=0.25, or a share of channels=0.33, heads=0.25, blocks=0.2,
    experts=0.25, vocabulary=96k (tokens to keep); repeatable or comma-separated. size is the share of the
    parameters to remove, or the size to keep: size=100MB, size=1.2B. Also experts=keep:96 (experts to keep),
    vocabulary=0.6 (a share to remove) and vocabulary=loss:1% (as few tokens as cost at most 1 % more bits per
    byte)."""
    score: Literal["magnitude", "wanda"] | Named | Sequence[Named]
    """Score for channels and heads: obs (what the others cannot make up for; the default), wanda_sp, flap or
    magnitude; for blocks: map (a run of blocks that a linear map replaces best; the default), kl (change of the
    output without it) or influence (change of its inputs); for experts: reap (gate times output; the default),
    frequency, random, or aimer (weights alone, without text); options as in wanda_sp:refit=true; repeatable."""
    domains: str | Sequence[str] | Mapping[str, File]
    """Texts by domain, for scoring experts on the same number of samples of each instead of on the calibration text:
    code=code.jsonl,chat=chat.jsonl; or the experts.json of an earlier run, to blend its scores anew without a pass;
    repeatable."""
    blend: str
    """How domains are blended: max-min (maximise the score kept by the domain that keeps the least), or by weights:
    code=2,chat=1."""
    align: int
    """Keep channels in multiples of this, if the model has them."""
    vocabulary_text: str | Sequence[str] | Mapping[str, float]
    """Texts that decide which tokens to keep: files, folders or corpora, word lists of languages (needs
    coprune[languages]), and code, each with an optional share: mine.jsonl=2,en,code=0.5; repeatable. [the
    calibration text, en and code]"""
    vocabulary_force: bool
    """Cut the vocabulary even if that saves less than 5 % of the weights' bytes."""
    dataset: CalibrationData
    """Calibrate on wikitext2, c4, embedded, a datasets id or your file. Text: also ptb, a folder, and self (generated
    by the dense model; self:prompts.jsonl: its answers); files are .txt, .jsonl or .parquet; several with shares:
    self=0.5,wikitext2=0.5. Images: digits, a folder of classes, .parquet, or a datasets id."""
    nsamples: int
    """Number of calibration samples."""
    seqlen: int | None
    """Tokens per sample and per perplexity window. [min(2048, model's limit)]"""
    calibrate_on: Literal["all", "generated"]
    """Positions that count in the statistics: all, or only generated ones, with the rest as context. Text without
    information on who wrote it counts whole."""
    seed: int
    """Random seed."""
    batch_size: int | None
    """Samples per forward pass. [about 512 tokens on a CPU, 4096 elsewhere]"""
    activation_memory: float | None
    """GiB of calibration activations to keep in memory; the rest goes to a temporary file and is read back batch by
    batch. [all in memory]"""
    device_activation_memory: float | None
    """GiB of calibration activations to keep on a GPU; the rest goes to host memory, within activation_memory. [half
    of the free GPU memory]"""
    propagation: Literal["block", "sequential", "dense"]
    """block: statistics of a block from its dense weights, as in the papers; sequential: each matrix from the inputs
    given by its pruned predecessors, in one pass (faster); dense: each matrix from its inputs in the dense model,
    in one pass, so that all methods and patterns share the same statistics."""
    finetune: Literal["lora", "dense", "distill", "lora-distill"] | str | None
    """Fine-tune the pruned model, keeping its zeros."""
    finetune_minutes: float | None
    """Time limit, from loading to saving; the learning rate falls with it. [one pass over the text]"""
    finetune_tokens: int | None
    """Number of tokens to fine-tune on, which sets the number of steps. [one pass over the text]"""
    finetune_epochs: float
    """Passes over the data, unless tokens, steps or minutes are given."""
    finetune_max_steps: int | None
    """Optimiser steps."""
    finetune_batch_size: int | None
    """Windows or images per process and forward pass. [1 window, 32 images]"""
    finetune_accumulate: int | None
    """Gradient accumulation: forward passes per step. [8 of text, 1 of images]"""
    finetune_lr: float | None
    """Peak learning rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]"""
    finetune_rates: Literal["absolute", "relative"]
    """absolute: one learning rate for all trained weights; relative: times the size of each matrix and vector, so that
    one rate serves models with smaller or larger weights."""
    finetune_only: str | Sequence[str]
    """Train only weights that match this pattern, such as '*.q_proj', or blocks or routers; repeatable. blocks: freeze
    embeddings, head and other matrices around the blocks, unless they were pruned; routers: only the routers, after
    experts were removed. [lora: all pruned linear layers; else all weights]"""
    finetune_dtype: Literal["float32", "bfloat16"]
    """Compute type of the fine-tuning; trained weights are float32."""
    finetune_gradient_checkpointing: bool
    """Recompute activations to save memory."""
    finetune_held_out: float
    """Share of the samples held out (at most 64 windows or 2,048 images); 0: no held-out loss."""
    finetune_save_every: int
    """Steps between checkpoints from which training resumes."""
    finetune_eval_seqlen: int | None
    """Tokens per window of perplexity. [as in training]"""
    finetune_teacher: File | None
    """The dense model: target of distill, and the reference for answers. [in prune: the model]"""
    finetune_rank: int
    """lora: rank of the adapters."""
    finetune_alpha: float
    """lora: the update is scaled by alpha / rank."""
    finetune_masked: bool
    """lora: mask the update; otherwise adapters are plain PEFT ones and stay unmerged."""
    evaluate: bool
    """Measure perplexity or accuracy before and after."""
    evaluate_dense: bool
    """Measure the dense model's perplexity too."""
    eval_data: TextData | None
    """Texts for perplexity; comma-separated. The last tenth of your own file is held out for it. [the corpus's test
    split, or your file's last tenth]"""
    eval_zero_shot: bool
    """Run the papers' seven zero-shot tasks (needs coprune[eval])."""
    tasks: Sequence[File] | File | None
    """Tasks of lm-eval to run, comma-separated; implies --eval-zero-shot, which alone runs boolq, rte, hellaswag,
    winogrande, arc_easy, arc_challenge and openbookqa."""
    num_fewshot: int
    """Number of solved examples before each question."""
    include_path: File | None
    """Folder with your own task definitions (YAML); those that run code (`!function`) need --trust-tasks."""
    trust_tasks: bool
    """Allow task definitions to run the code that they name; read it first."""
    limit: int | None
    """Maximum number of items per task. [all]"""
    apply_chat_template: bool
    """Format the tasks' prompts with the tokenizer's chat template."""
    gen_kwargs: str | None
    """Generation settings of the tasks, as in max_gen_toks=64,do_sample=true,temperature=0.7."""
    log_samples: File | None
    """Folder for the tasks' items with the model's answers, one .jsonl file per model and task."""
    prompt: str
    """Text that both models continue, for the report; empty: none, as for streamed models."""
    layer_error: bool
    """Measure every matrix's relative layer error (costs little)."""
    gate: bool
    """Check a saved model on a few short prompts, and report answers that loop or are empty."""
    save: File | None
    """Run folder for recipe, report and log. [out/MODEL/PATTERN/METHOD]"""
    save_model: File | None
    """Folder for the pruned model and tokenizer; NAME.gguf if experts, blocks or tokens are removed from a GGUF file,
    for a file in which the rest keeps the source's bytes. [not saved]"""
    encoding: Literal["source", "dense"]
    """How the saved model's tensors are stored: like the source's (FP8, MXFP4, INT4 …, else dense), or dense, which
    any tool can read."""
    report_to: Sequence[File] | File | None
    """Also log to these, comma-separated: tensorboard, wandb, mlflow, trackio."""
    push_to_hub: str | None
    """Upload the saved model with its card to this repository of the Hub."""
    private: bool | None
    """Make that repository, which must be new, private."""
    overwrite: bool | None
    """Overwrite an earlier run's files in this run's folders."""
    log_json: File | None
    """Also log events to this file, one JSON object per line."""
    sparsity_ratio: float | str | None
    sparsity_type: str
    use_variant: bool
    train: Literal["whole", "blocks"] | None
    """What a preset trains. [whole, if it fits the memory]"""


class PruneArguments(RecipeArguments, total=False):
    """The settings of a recipe, and the methods' own options."""

    group: Literal["row", "matrix"]
    """Weights that compete: those of the whole matrix (the usual baseline) or of one output row. Weights that compete:
    those of one output row (the paper's choice) or the whole matrix. Weights that compete: those of the whole
    matrix (as in the authors' code) or of one output row. Weights that compete when the pattern is unstructured."""
    block_size: int
    """Columns whose mask is chosen together (unstructured); for N:M it is rounded up to a multiple of M. Columns whose
    mask is chosen together (iterative, unstructured); for N:M it is rounded up to a multiple of M."""
    damping: float
    """Added to the Hessian's diagonal, as a fraction of its mean. Added to the unit diagonal of the scaled Gram
    matrix. Added to the Gram matrix's diagonal before it is scaled, as a fraction of its mean."""
    inner_loop: Literal["auto", "torch", "triton"]
    """The loop over a block's columns: auto is a native kernel on CPUs where it compiles, a Triton kernel on NVIDIA
    GPUs where it matches torch, and torch elsewhere."""
    selection: Literal["sequential", "iterative"]
    """Whether the mask is chosen before the update (`sequential`) or along with it (`iterative`)."""
    power: float
    """Exponent of the input norms: n^power."""
    start: Literal["magnitude", "wanda", "ria"]
    """The method that gives the initial mask."""
    cycles: int
    """Maximum number of swaps per row."""
    rounds: int
    """Number of alternations. Maximum number of rounds; stops as soon as the mask settles."""
    mask_rounds: int
    """Number of initial rounds that choose the mask anew, on a cubic sparsity schedule."""
    rho: float
    """Strength of the pull toward the sparse weights. The penalty at the start."""
    rounds_per_rho: int
    """Number of rounds after which the mask is checked and ρ raised."""
    refit_rounds: int
    """Rounds of conjugate gradients on the final mask."""


class MeasureArguments(SharedArguments, total=False):
    """The measurements of a model, and how they are done."""

    tasks: Sequence[File] | File | None
    """Tasks of lm-eval, comma-separated, such as boolq,arc_easy."""
    eval_zero_shot: bool
    """Run the papers' seven zero-shot tasks (needs coprune[eval])."""
    num_fewshot: int
    """Number of solved examples before each question."""
    include_path: File | None
    """Folder with your own task definitions (YAML); those that run code (`!function`) need --trust-tasks."""
    trust_tasks: bool
    """Allow task definitions to run the code that they name; read it first."""
    limit: int | None
    """Maximum number of items per task. [all]"""
    apply_chat_template: bool
    """Format the tasks' prompts with the tokenizer's chat template."""
    gen_kwargs: str | None
    """Generation settings of the tasks, as in max_gen_toks=64,do_sample=true,temperature=0.7."""
    log_samples: File | None
    """Folder for the tasks' items with the model's answers, one .jsonl file per model and task."""
    seqlen: int | None
    """Tokens per window. [min(2048, model's limit)]"""
    batch_size: int | None
    """Windows per forward pass. [about 4096 tokens]"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."""


class FinetuneArguments(SharedArguments, total=False):
    """The settings of a training, except the model and the mode."""

    dataset: CalibrationData
    """Text to train on, as in prune: wikitext2, c4, embedded, a datasets id or a local file; pairs or recordings, if
    the model reads these; or images: digits, a folder of classes, .parquet, or a datasets id. [embedded]"""
    seqlen: int | None
    """Tokens per training window. [min(1024, model's limit)]"""
    seed: int
    """Random seed."""
    train: str | Sequence[str]
    """Train only weights that match this pattern, such as '*.q_proj', or blocks or routers; repeatable. blocks: freeze
    embeddings, head and other matrices around the blocks, unless they were pruned; routers: only the routers, after
    experts were removed. [lora: all pruned linear layers; else all weights]"""
    minutes: float | None
    """Time limit, from loading to saving; the learning rate falls with it. [one pass over the text]"""
    tokens: int | None
    """Number of tokens to fine-tune on, which sets the number of steps. [one pass over the text]"""
    epochs: float
    """Passes over the data, unless tokens, steps or minutes are given."""
    max_steps: int | None
    """Optimiser steps."""
    batch_size: int | None
    """Windows or images per process and forward pass. [1 window, 32 images]"""
    accumulate: int | None
    """Gradient accumulation: forward passes per step. [8 of text, 1 of images]"""
    learning_rate: float | None
    """Peak learning rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]"""
    rates: Literal["absolute", "relative"]
    """absolute: one learning rate for all trained weights; relative: times the size of each matrix and vector, so that
    one rate serves models with smaller or larger weights."""
    dtype: Literal["float32", "bfloat16"]
    """Compute type of the fine-tuning; trained weights are float32."""
    gradient_checkpointing: bool
    """Recompute activations to save memory."""
    held_out: float
    """Share of the samples held out (at most 64 windows or 2,048 images); 0: no held-out loss."""
    save_every: int
    """Steps between checkpoints from which training resumes."""
    eval_seqlen: int | None
    """Tokens per window of perplexity. [as in training]"""
    teacher: File | None
    """The dense model: target of distill, and the reference for answers. [in prune: the model]"""
    rank: int
    """lora: rank of the adapters."""
    alpha: float
    """lora: the update is scaled by alpha / rank."""
    masked: bool
    """lora: mask the update; otherwise adapters are plain PEFT ones and stay unmerged."""
    exclude: str | Sequence[str]
    """Do not train what matches this pattern, nor blocks that match it entirely; repeatable."""
    evaluate: bool
    """Measure perplexity or accuracy before and after."""
    eval_data: TextData | None
    """Texts for perplexity; comma-separated. The last tenth of your own file is held out for it. [the corpus's test
    split, or your file's last tenth]"""
    gate: bool
    """Check a saved model on a few short prompts, and report answers that loop or are empty."""
    report_to: Sequence[File] | File | None
    """Also log to these, comma-separated: tensorboard, wandb, mlflow, trackio."""
    save: File | None
    """Run folder. [out/finetune/MODEL/MODE]"""
    save_model: File | None
    """Folder for the model. [model/ in the run folder]"""
    overwrite: bool | None
    """Overwrite an earlier run's files in this run's folders."""


class GenerateArguments(TypedDict, total=False):
    """How a model generates texts."""

    samples: int | None
    """Texts. [one per prompt, or 16]"""
    seqlen: int | None
    """Maximum tokens per text, without its prompt. [512, or the model's limit]"""
    temperature: float
    """Divisor of the logits; 0 takes the likeliest tokens."""
    top_p: float
    """Sample from the likeliest tokens with this total probability."""
    seed: int
    """Seed of the sampling."""
    column: str | None
    """Column of the prompts. [prompt]"""
    template: Literal["chat", "none"] | None
    """Whether prompts go through the chat template. [chat, if there is one]"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."""
    device: str
    """auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    cache_dir: File | None
    """Folder for downloads. [the Hugging Face cache]"""


class ExportArguments(TypedDict, total=False):
    """Settings of an export to a GGUF file."""

    like: File | None
    """GGUF file of the source model, in any type: its metadata, tokenizer and order are used. [the one that the model
    was made from, or the converter's output]"""
    converter: File | None
    """llama.cpp's convert_hf_to_gguf.py, or its folder; for a model folder without like. [in $LLAMA_CPP, or on the
    PATH]"""
    padded: bool
    """Keep channels and heads that are all zeros, which pad blocks to one width."""
    imatrix: File | None
    """How much each input of a matrix matters, for llama.cpp's quantised types: auto (measured on the dataset), a file
    from llama-imatrix, or none. Types below iq3_s need it."""
    compensate: bool
    """Round the blocks' matrices column by column, so that later columns compensate for each one's error on the
    dataset (GPTQ): same type and size, closer to the model."""
    distill: int
    """Number of tokens of the dataset on which the scales of the quantised blocks are trained toward the model's own
    outputs: same type and size, closer to the model. 30720 are a good start."""
    dataset: str
    """Text to calibrate the importance of inputs and the compensation on, and to train on."""
    save_imatrix: File | None
    """Also write the importance to this file, in llama.cpp's format."""
    modelfile: bool
    """Write an Ollama Modelfile beside the file: its stop tokens, and the chat template if it is proven to be the same
    in Ollama's template language."""


class FitArguments(TypedDict, total=False):
    """Settings of the search for the smallest file."""

    target: Literal["size", "speed", "memory"]
    """What to minimise; size is the file's, memory counts 2,048 tokens, speed is the time of a token."""
    runtime: Literal["llama.cpp", "transformers"]
    """Where it will run; llama.cpp takes a GGUF file, transformers a folder."""
    budget: str | float
    """Time limit of search and proof: 60m, 2h, or minutes. [60m]"""
    items: int | None
    """Maximum items per task. [all]"""
    text: str | None
    """Additional text to calibrate and distill on. [generated by the model]"""
    like: File | None
    """Any GGUF file of the model, in any type; needed for a folder unless there is a converter."""
    converter: File | None
    """llama.cpp's convert_hf_to_gguf.py, or its folder; for a model folder without like. [in $LLAMA_CPP, or on the
    PATH]"""
    without: str | Sequence[str]
    """Kinds of changes not to try: vocabulary, experts, blocks, channels, embedding, mixed (types by tensor)."""
    types: str | Sequence[str]
    """Types of llama.cpp to try, separated by commas. [q8_0 to iq2_xs]"""
    candidate: File | Sequence[File]
    """Another GGUF file of the model, to be measured like those made here; repeatable."""
    step: str | Sequence[str]
    """A registered step to try before the types, as NAME:SETTING=VALUE,…; repeatable."""
    workers: int
    """Candidates to measure in parallel, in local processes."""
    ray: str | None
    """Measure on a Ray cluster instead (host:port, auto, local)."""
    seed: int
    """Seed of the halves and of all sampling."""
    trust_tasks: bool
    """Allow task definitions to run the code that they name; read it first."""


class ExecutionArguments(TypedDict, total=False):
    """Where and how the runs of a sweep execute."""

    ray: str | None
    """Run on the Ray cluster at this address (host:port, auto), or without one on a local cluster."""
    workers: int | None
    """Number of parallel runs. [as many as cores and, by the estimates, memory allow]"""
    threads: int | None
    """Cores per run. [all cores, divided among the runs]"""
    retries: int
    """Retries of a run that crashed or was killed."""
