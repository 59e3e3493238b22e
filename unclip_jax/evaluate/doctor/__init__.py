"""`unclip doctor`: which stage of a bundle or a run is to blame. `examine.examine` runs all checks."""
