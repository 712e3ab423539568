"""Bases in llama.cpp's file format: read, turned into a model folder once, and their blocks as they lie."""
