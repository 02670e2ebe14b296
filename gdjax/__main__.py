"""`python -m gdjax` is the command `gdjax`."""

from gdjax.cli import main

if __name__ == "__main__":
    main()
