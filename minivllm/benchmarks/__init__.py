"""Measurements a learner can repeat: each prints a short table and writes its numbers as JSON."""
