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
def few_strengths():
    """Linear probes try 3 regularisation strengths, not 13: a third of the time of their tests.

    unit/test_probe.py tests the sweep.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("downstream.probe.GRID", (0.01, 1.0, 100.0))
        yield
