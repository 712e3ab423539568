"""How good a pool is on texts it has not seen: where its router sends them, and what the answers cost."""
