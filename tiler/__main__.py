"""`python -m tiler` is the command `tiler`."""

from tiler.cli.main import main

main()
