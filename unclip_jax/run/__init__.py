"""The machinery of a training run, apart from the method: its state, loop, checkpoints and figures."""
