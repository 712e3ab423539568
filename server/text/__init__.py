"""Between text and tokens: prompts, incremental detokenising, stop strings."""
