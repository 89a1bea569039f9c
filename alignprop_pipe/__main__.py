"""`python -m alignprop_pipe` is the command `alignprop`."""

from alignprop_pipe.cli.app import app

if __name__ == "__main__":
    app()
