"""The command line: one command per file and no logic; nothing heavy is imported before a command runs."""
