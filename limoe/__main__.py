"""`python -m limoe ...` does the same as `limoe ...`."""

from limoe.cli import run

if __name__ == "__main__":
    run()
