"""The pipeline's events as OpenAI answers: chunk by chunk, or folded into one."""
