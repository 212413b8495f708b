"""Graphs: a model becomes graphs that are right in train and in eval mode."""
