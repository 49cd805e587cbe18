"""Chapter 5's own scripts: its toy, a batch run on pages, what memory holds, and the figures."""
