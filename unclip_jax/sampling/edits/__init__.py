"""What unCLIP does to images: inversion, variations, interpolation, text diffs, reconstructions, inpainting."""
