"""Before training: widths and channels chosen at the start values."""
