"""Chapter 1's own scripts: its toy example, the traffic count, the comparison and the figures."""
