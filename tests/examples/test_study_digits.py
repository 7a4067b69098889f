"""The study of digits at reduced size."""

from functools import partial

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_trains_studies_and_goes_on(example, tmp_path, capsys, monkeypatch):
    study = example("study_digits")
    pictures, classes = study.digits(train=True)
    monkeypatch.setattr(study, "digits", lambda train: (pictures[:320], classes[:320]))
    arguments = ["--out", str(tmp_path), "--epochs", "1", "--seeds", "1", "--sizes", "small", "--num-images", "8"]
    told = study.main([*arguments, "--families", "cnn", "mixer"])
    printed = capsys.readouterr().out
    assert "4 models, accuracy" in printed
    assert any(one.startswith("relative error") and "over all models (4)" in one for one in told)
    assert (tmp_path / "study-1-epochs" / "report.html").exists()
    monkeypatch.setattr(study, "write_report", partial(study.write_report, pictures=False))
    assert study.main([*arguments, "--families", "cnn", "mixer"]) == told
    assert "trained" not in capsys.readouterr().out
