"""The commands by theme; `coprune.commands.app` puts them together. Nothing heavy is imported before one runs."""
