"""How a request is cut into tiles, what each phase will take, and how long: computed from shapes alone."""
