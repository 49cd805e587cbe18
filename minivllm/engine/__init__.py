"""Storeys 6 to 8: from blocks and sequences to an engine that serves many requests at once."""
