"""The embedded emoji dataset: captioned 64x64 drawings in TFRecord shards, and the program that builds it."""
