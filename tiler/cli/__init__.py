"""The command line: one file a command; parse, request, run, print. Knows nothing of torch."""
