"""Diffusion mathematics on arrays: schedules, the forward process, losses, samplers and guidance."""
