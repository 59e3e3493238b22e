"""Figures of merit, as functions of embeddings and images."""
