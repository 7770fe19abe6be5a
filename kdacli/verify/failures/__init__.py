"""What a failure means: the smallest case that still fails, what kind of wrong it is, and where."""
