"""The files that a render keeps beside its unfinished picture, so that an interrupted render can continue."""
