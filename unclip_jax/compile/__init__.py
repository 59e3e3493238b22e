"""Compiles a stage's programs for devices that this machine need not have."""
