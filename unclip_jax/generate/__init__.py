"""Guided sampling of one stage at a time. Pure and jittable; training and sampling both stand on it."""
