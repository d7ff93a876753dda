"""Weights that other people published, in and out: a file for each origin, and every conversion verified."""
