"""What is kept on disk: training checkpoints (Orbax) and release bundles (safetensors)."""
