"""Chapter 4's own scripts: its toy, a prefill to watch and to measure, and the figures."""
