"""Does routing help? The QLoRA-MoE report's experiment on bases of our own (docs/quality.md)."""
