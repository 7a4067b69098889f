"""The attribution example at reduced size."""

import pytest

for module in ("sklearn", "timm", "matplotlib"):
    pytest.importorskip(module)


def test_trained_models(example, tmp_path, capsys, monkeypatch):
    attribution = example("layerwise_attribution")
    images, labels = attribution.digits()
    monkeypatch.setattr(attribution, "digits", lambda: (images[:460], labels[:460]))
    arguments = ["--epochs", "1", "--num-images", "4", "--probes", "2", "--threads", "1", "--out", str(tmp_path)]
    results = attribution.main(arguments)
    printed = capsys.readouterr().out
    assert set(results) == {"cnn", "cnn, anti-aliased", "vit"}
    assert all(max(found.residual.values()) < 1e-3 for by in results.values() for found in by.values())
    assert "Down-sampling adds, in output standard deviations per half side" in printed
    assert (tmp_path / "layers-cnn-anti-aliased.png").stat().st_size > 10_000


def test_any_timm_model(example, tmp_path, capsys, monkeypatch):
    import timm

    attribution, config = example("layerwise_attribution"), timm.data.resolve_model_data_config

    def smaller(model):
        channels, height, width = config(model)["input_size"]
        return {"input_size": (channels, height // 2, width // 2)}

    monkeypatch.setattr(timm.data, "resolve_model_data_config", smaller)
    arguments = ["--models", "test_resnet", "--num-images", "1", "--probes", "1", "--threads", "1"]
    results = attribution.main([*arguments, "--out", str(tmp_path)])
    assert "share of the error" in capsys.readouterr().out
    assert set(results["test_resnet"]) == {"bilinear", "bspline", "fourier"}
