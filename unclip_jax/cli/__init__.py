"""The `unclip` command, with one thin file per verb. It imports nothing heavy before a verb runs."""
