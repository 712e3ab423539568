"""LoRA files, blends, merging, residency, layers put into the base; training experts."""
