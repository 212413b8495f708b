"""DropBack: training on a weight budget."""
