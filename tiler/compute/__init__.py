"""Arithmetic with streamed weights: which weights are held, which samples share a read, one file per kernel. Knows
nothing of models."""
