"""Appendix: how the embedded model, Tiny Qwen3, is made (see README.md beside this file)."""
