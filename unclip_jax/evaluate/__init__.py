"""Measuring a bundle: bundle in, report out."""
