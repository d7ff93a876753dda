"""The contrastive losses are one number: on 1, 2 and 4 processes, with cached gradients and
without.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.contrast import CASES
from tests.recipes.runs import in_processes


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict[str, torch.Tensor]]:
    """Processes -> what `contrast.main` found on as many."""
    folder, found = tmp_path_factory.mktemp("contrast"), {}
    for processes in (1, 2, 4):
        out = folder / f"{processes}.safetensors"
        done = in_processes(folder, processes, "tests.parity.contrast", "main", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        muon = [load_file(f"{out}.{rank}") for rank in range(processes)]
        of_each = {f"muon {i} {r}": m[i] for r, m in enumerate(muon) for i in m}
        found[processes] = load_file(out) | of_each
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("loss", "several"), CASES)
def test_loss_and_gradients_do_not_depend_on_processes_or_passes(results, dtype, loss, several):
    # Processors round float32 differently: 1.2e-6 was seen on one. float64 shows that the sums are
    # the same.
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    prefix = f"{dtype} {loss} {several}"
    direct = {
        k.removeprefix(f"{prefix} 1 "): v
        for k, v in results[1].items()
        if k.startswith(f"{prefix} 1 ")
    }
    assert "log_scale" in direct and ("bias" in direct) == (loss == "siglip")
    largest = max(v.abs().max() for k, v in direct.items() if k != "loss")
    assert largest > 1e-3
    compared = 0
    for processes, passes in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
        for name, expected in direct.items():
            found = results[processes][f"{prefix} {passes} {name}"]
            scale = max(expected.abs().max().item(), 0.01 * largest.item())
            error = (found - expected).abs().max().item() / scale
            assert error < tolerance, (processes, passes, name, error)
            compared += 1
    assert compared == 6 * len(direct)


@pytest.mark.parametrize("kind", ["views", "sigreg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_comparing_views_does_not_depend_on_processes(results, dtype, kind):
    """2 processes hold two whole clips each, 4 one; all clips are kept apart from one another."""
    # Reconstruction, which is beside the contrast here, is summed in fp32.
    exact = 1e-12 if kind == "sigreg" else 1e-7
    tolerance = 1e-5 if dtype == torch.float32 else exact
    names = [name for name in results[1] if name.startswith(f"{dtype} {kind}")]
    assert len(names) > 20
    for name in names:
        expected = results[1][name]
        for processes in (2, 4):
            error = (results[processes][name] - expected).abs().max() / expected.abs().max().clamp(
                min=1e-3
            )
            assert error < tolerance, (processes, name, error)


def test_muon_shares_its_work_out_and_every_process_gets_the_same_bits(results):
    for number in range(3):
        expected = results[1][f"muon {number}"]
        for processes in (2, 4):
            for rank in range(processes):
                assert torch.equal(results[processes][f"muon {number} {rank}"], expected)
