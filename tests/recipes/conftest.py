"""What all tests of recipes share."""

import base64
from pathlib import Path

import pytest
from matplotlib.figure import Figure

# A white pixel.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAGAw2iwAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module", autouse=True)
def blank_figures(request):
    """Figures are composed but not drawn, unless a module sets `DRAWS`: an eighth of the time.

    What can go wrong in drawing is tested in unit/test_report.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWS", False):
            patch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(PICTURE))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_strengths_and_draws():
    """Linear probes try 3 regularisation strengths, not 13: a third of the time of their tests.

    A bootstrap draws 200 times, not 2000: a quarter of the time of a small fine-tuning.
    unit/test_probe.py tests the sweep, unit/test_metrics.py the intervals.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("downstream.metrics.RESAMPLES", 200)
        patch.setattr("downstream.probe.GRID", (0.01, 1.0, 100.0))
        yield
