"""Chapter 2's own scripts: its toy model, text on the screen, the measurement and the figures."""
