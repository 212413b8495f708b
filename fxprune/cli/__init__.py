"""The command line: ``fxprune inspect``, ``prune``, ``apply``, ``bench``, ``export`` and ``diff``."""
