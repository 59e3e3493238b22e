"""`unclip serve`: the images API that OpenAI published, the paper's own verbs, and a page."""
