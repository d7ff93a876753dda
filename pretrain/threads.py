"""How the threads of a computation wait for one another; to be imported before torch.

Between two parallel parts of a computation the threads of libgomp, torch's OpenMP, spin for
milliseconds. On a machine that others use too, a thread then spins for one that does not run, in
time that this one would need. After a thousand rounds, some microseconds, they now sleep:
recipes/RESULTS.md has what that is worth. libgomp reads the environment once, when torch loads it.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():  # nobody's wish
    os.environ["GOMP_SPINCOUNT"] = "1000"
