"""Chapter 7: the scheduler, which chooses what runs in every step, and the engine around it."""
