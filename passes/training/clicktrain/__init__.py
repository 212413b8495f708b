"""ClickTrain: patterns of kernels, chosen and trained in one run."""
