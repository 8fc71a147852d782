"""The command line, one file per command: parse the options, make a request, run it, print the result. Imports no
torch."""
