"""Training: one linear file per stage, and what is not the method (state, optimizer, logging)."""
