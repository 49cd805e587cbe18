"""One model on many devices: tensor parallelism (chapter 9)."""
