"""Chapter 3's own scripts: its toy, the measurements of time and memory, and the figures."""
