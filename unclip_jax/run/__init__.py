"""What a training run is and the method is not: its state, its loop, its checkpoints and figures."""
