"""Datasets, tokenisation and input pipelines: TensorFlow and NumPy only."""
