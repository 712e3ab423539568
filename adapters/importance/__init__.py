"""How much the loss of a task depends on each parameter and rank of an adapter (LoRACoE §2.1)."""
