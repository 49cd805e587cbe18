"""Storey 2: whole decoders built from the layers, and the loader that fills them."""
