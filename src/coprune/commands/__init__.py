"""The commands by theme; `coprune.cli` puts them together. Nothing heavy is imported before one runs."""
