"""The flags of recipes that load torch, apart from them.

`muybridge NAME --help` and a mistake in a flag need nothing else: what stands here loads no library
but tyro and numpy. `command(main)` parses the command line and runs `main` of the recipe.
"""
