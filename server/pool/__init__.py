"""Pools on disk: reading, checking, extending and building them."""
