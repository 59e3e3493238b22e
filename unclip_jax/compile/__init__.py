"""A stage's programs compiled for devices that need not be there."""
