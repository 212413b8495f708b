"""Training passes: each stands in a Session."""
