"""`loramux analyze importance`: the LoRACoE paper's analysis on adapters of one's own."""
