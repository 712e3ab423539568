"""Sparse models: LoRA mixtures that choose their experts token by token."""
