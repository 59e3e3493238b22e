"""From a bundle to arrays."""
