"""Plan a request: its tiles, the memory and the time of each phase, computed from shapes alone."""
