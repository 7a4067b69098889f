"""The study of digits at reduced size."""

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_trains_studies_and_goes_on(example, tmp_path, capsys):
    study = example("study_digits")
    arguments = ["--out", str(tmp_path), "--epochs", "1", "--seeds", "1", "--sizes", "small", "--num-images", "8"]
    told = study.main([*arguments, "--families", "cnn", "mixer"])
    printed = capsys.readouterr().out
    assert "4 models, accuracy" in printed
    assert any(one.startswith("relative error") and "over all models (4)" in one for one in told)
    assert (tmp_path / "study-1-epochs" / "report.html").exists()
    assert study.main([*arguments, "--families", "cnn", "mixer"]) == told
    assert "trained" not in capsys.readouterr().out
