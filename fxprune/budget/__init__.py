"""Budget: what a model costs, what may remain, and the plans that meet it."""
