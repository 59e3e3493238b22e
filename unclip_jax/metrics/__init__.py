"""Evaluation metrics: functions from arrays to numbers."""
