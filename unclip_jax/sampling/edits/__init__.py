"""Image edits with unCLIP: inversion, variations, interpolation, text diffs, reconstructions, inpainting."""
