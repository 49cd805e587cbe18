"""Storey 1: the blocks of a decoder. Each stands alone and takes its sizes as arguments."""
