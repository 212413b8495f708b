"""The command line: ``fxprune inspect``, ``prune``, ``apply``, ``export`` and ``diff``."""
