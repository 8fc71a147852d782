"""`python -m tiler`."""

from tiler.cli.main import main

if __name__ == "__main__":
    main()
