"""The `unclip` command: one thin file per verb. Nothing heavy is imported before a verb runs."""
