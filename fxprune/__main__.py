"""``python -m fxprune``: the command line."""

from fxprune.cli.app import main

if __name__ == "__main__":
    main()
