"""What is typed: one command, one file, and no logic; nothing heavy is imported before one runs."""
