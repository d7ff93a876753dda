"""What benchmark.py says of speed."""

import re

import pytest

from pretrain import device
from recipes import benchmark


@pytest.mark.slow
def test_mfu_is_said_of_a_stated_peak_only(monkeypatch, capsys):
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    cfg = benchmark.Config(what="step", model="vit_xs", batch_size=1, rounds=1)
    benchmark.main(cfg)
    assert "MFU" not in capsys.readouterr().out
    benchmark.main(benchmark.Config(what="step", model="vit_xs", batch_size=1, rounds=1, peak=0.01))
    (line,) = (li for li in capsys.readouterr().out.splitlines() if "fp32 muybridge" in li)
    seconds, percent = re.search(r"([0-9.]+) s .*MFU ([0-9.]+)%", line).groups()  # type: ignore
    model = benchmark.VideoMAE(
        benchmark.VideoTransformer(*benchmark.SIZES["xs"]), *benchmark.DECODERS["xs"]
    )
    # 8 x 14 x 14 tokens, of which a tenth are visible in each of the 8.
    visible = 8 * (196 - round(0.9 * 196))
    rate = benchmark.step_flops(model, visible, 1568 - visible) / float(seconds)
    assert float(percent) == pytest.approx(100 * rate / 1e10, rel=0.05)
