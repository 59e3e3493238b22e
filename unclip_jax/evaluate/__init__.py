"""Evaluation: measures a bundle and returns a report."""
