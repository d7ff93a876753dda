"""One runnable file per job: `python recipes/NAME.py`, or `muybridge NAME`."""
