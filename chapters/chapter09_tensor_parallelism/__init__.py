"""Chapter 9: tensor parallelism, one model on many GPUs."""
