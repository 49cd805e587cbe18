"""Storeys 3 to 5: attention, first naive, then without the score matrix, then on pages."""
