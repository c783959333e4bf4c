"""All sections in order: those that test correctness come first, in case time runs out."""

from __future__ import annotations

from gpu_sections.section import Section

SECTIONS: dict[str, Section] = {
    "machine": Section("The machine", "machine:measure", 40, proves=False),
    "kernels": Section("Kernels against their definitions", "kernels:compare", 60, proves=True),
    "cases": Section("Cases against the CPU", "correctness:cases", 130, proves=True),
    "real": Section("A real model against the CPU", "correctness:real_model", 80, proves=True),
    "full": Section("A device that gets full", "memory:full", 40, proves=True),
    "waits": Section("How often the host waits", "waits:count", 50, proves=False),
    "smollm2": Section("Pruning SmolLM2-135M", "pruning:smollm2", 60, proves=False),
    "wide": Section("Pruning blocks as wide as those of Llama-3-8B", "pruning:wide", 110, proves=False),
    "traffic": Section("Where activations and blocks lie", "pruning:traffic", 50, proves=False),
    "tuning": Section("Fine-tuning", "tuning:adapters", 50, proves=False),
    "several": Section("Two GPUs", "several:together", 60, proves=True),
}
