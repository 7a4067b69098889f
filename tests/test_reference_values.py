"""Values computed beforehand with an independent implementation, in the paper's convention, reproduced in float64."""

import json
from pathlib import Path

import pytest
import torch
from references import filled, waves

import lie_metric as lm

timm = pytest.importorskip("timm")
CASES = json.loads((Path(__file__).parent / "reference_values.json").read_text())["end_to_end"]


METHODS = ("auto", "forward", "forward vmap", "reverse", "double_backward")
# All of both models; of the larger one, only what is chosen by itself is in the fast suite.
RUNS = [
    pytest.param(case, method, id=f"{case['model']}-{method}", marks=pytest.mark.slow if late else ())
    for case in CASES
    for method in METHODS
    for late in [case["model"] == "resnet18" and method != "auto"]
]


@pytest.mark.parametrize(("case", "method"), RUNS)
def test_end_to_end_values(case, method):
    torch.set_default_dtype(torch.float64)
    try:
        model = filled(timm.create_model(case["model"], num_classes=10, **case["kwargs"]).double())
    finally:
        torch.set_default_dtype(torch.float32)
    images = waves(case["batch"], case["size"])
    first = torch.tensor(case["probabilities_row0"], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).softmax(-1)[0], first, rtol=0, atol=1e-10)
        for output in ("probabilities", "logits"):
            found = lm.lie_derivative(model, images, "all", output=output, resampling=lm.PAPER, method=method)
            for generator, wanted in case[output].items():
                value = found[generator]
                assert value.square().mean().item() == pytest.approx(wanted["mean_square"], rel=1e-8)
                assert value.abs().mean().item() == pytest.approx(wanted["mean_abs"], rel=1e-8)
                row = torch.tensor(wanted["row0"], dtype=torch.float64)
                torch.testing.assert_close(value[0], row, rtol=1e-8, atol=1e-8 * row.abs().max().item())
            stretches = found["stretch_x"] + found["stretch_y"]
            torch.testing.assert_close(stretches, -found["scale"], rtol=1e-9, atol=1e-12)
