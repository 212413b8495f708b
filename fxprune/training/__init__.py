"""Training: cuts in the middle of a run, with everything that hangs on it."""
