"""Operators, one folder each: a plain reference first, then the forms that are fast on a device."""
