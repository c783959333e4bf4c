"""The command line: one command per file, no logic; nothing heavy is imported before a command runs."""
