"""The OpenAI wire format: strict request models, and the JSON of answers."""
