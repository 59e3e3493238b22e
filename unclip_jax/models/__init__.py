"""Flax linen modules, one file per named thing. They know no mesh, no files and no input pipeline."""
