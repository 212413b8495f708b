"""Report: what was done to a model, as tables, pages and measurements."""
