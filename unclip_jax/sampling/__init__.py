"""Sampling: draws images from a bundle, and edits images with it."""
