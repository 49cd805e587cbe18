"""Chapter 8: CUDA graphs, and a decode loop that never waits for Python."""
