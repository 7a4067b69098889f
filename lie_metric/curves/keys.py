"""Under which keys curves are logged: families, titles and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from lie_metric.algebra import Generator
from lie_metric.curves.measurements import Measurement
from lie_metric.functional.local_equivariance import Measure
from lie_metric.metrics import FiniteEquivarianceError, LocalEquivarianceError
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Layout
from lie_metric.warning import warn

__all__ = ["FAMILIES", "TITLES", "Keys", "Measure"]

FAMILIES: dict[str, tuple[str, str]] = {
    "relative": ("", "relative error: output standard deviations per unit of t"),
    "lee": ("_lee", "LEE: mean squared Lie derivative"),
    "rms": ("_rms", "root mean square of the Lie derivative, in units of the output"),
    "sensitivity": ("_sensitivity", "error relative to noise of the same size: 1 = nothing learned"),
}

TITLES = {
    "finite": "finite error at",
    "linearity": "linearity at 1 px: what is left of the first order",
    "floor": "stencil's own error, in units of the relative error",
}


def validate_prefix(prefix: object) -> None:
    """Refuses what cannot be the first word of keys."""
    if not isinstance(prefix, str) or not prefix or "/" in prefix:
        raise ValueError(
            f"`prefix` must be a non-empty string without '/', got {prefix!r}. "
            "Loggers group curves by the text before '/'."
        )


class Keys:
    """The keys of one monitor.

    Args:
        prefix: First word of the keys.
        measures: Which measures of the Lie derivatives are logged.
        generators: The generators.
        layout: The representation of the output, or those of its parts.
        metrics: The companions by name.
        built_in: Names of those that stand beside by default.
        displacement: By how many pixels images are moved for the finite error.
    """

    def __init__(
        self,
        prefix: str,
        measures: Sequence[Measure],
        generators: Sequence[Generator],
        layout: Layout | None,
        metrics: Mapping[str, ModelMetric],
        built_in: frozenset[str],
        displacement: float | None,
    ) -> None:
        self.prefix, self.measures, self.generators, self.layout = prefix, measures, generators, layout
        self.metrics, self.built_in, self.displacement = metrics, built_in, displacement

    def families(self) -> dict[str, tuple[str, Sequence[str]]]:
        """For the title of each family of curves the text before the slash of its keys, and what stands behind.

        Returns:
            The families, those of the Lie derivatives first.
        """
        generators = [generator.name for generator in self.generators]
        parts = [f"_{part}" for part in self.layout] if isinstance(self.layout, Mapping) else [""]
        found: dict[str, tuple[str, Sequence[str]]] = {
            FAMILIES[measure][1] + (part and f": {part[1:]}"): (self.prefix + part + FAMILIES[measure][0], generators)
            for measure in self.measures
            for part in parts
        }
        titles = TITLES | {"finite": f"{TITLES['finite']} {self.displacement or 0:g} px: 1 = as far as another image"}
        for name, metric in self.metrics.items():
            title = titles[name] if name in self.built_in else name.replace("_", " ")
            found[title] = (f"{self.prefix}_{name}", metric.names)
        return found

    def under(self, prefix: str) -> Self:
        """The same keys with another first word."""
        found = copy.copy(self)
        found.prefix = prefix
        return found

    def all(self) -> list[str]:
        """Every key of one loader, those of what is measured seldom among them."""
        return [
            f"{key}/{name}"
            for family, names in self.families().values()
            for key in (family, f"{family}_se")
            for name in names
        ]

    def values(
        self,
        measurements: Sequence[Measurement | None],
        tell: Callable[[str, Exception | None], None],
        device: torch.device,
        add_up: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The values under their keys, alike on all processes; NaN for what could not be measured.

        Args:
            measurements: What was measured of each loader.
            tell: Takes the name of a metric that failed, and why.
            device: Where processes exchange numbers, and where values go.
            add_up: The sum of a tensor over all processes.

        Returns:
            The values.
        """
        known = [measurement for measurement in measurements if measurement is not None]
        # Always the same collective operations on every process, whatever failed where.
        outcomes = torch.tensor(
            [[m.images, *(name in m.errors for name in m.metrics)] for m in known], device=device
        ).float()
        outcomes = add_up(outcomes)
        values: dict[str, Tensor] = {}
        for index, (measurement, (images, *failures)) in enumerate(zip(known, outcomes.tolist(), strict=True)):
            measured: dict[str, Mapping[str, Tensor]] = {}
            if not images and not any(failures):
                warn(f"No image of loader {index} was seen: its equivariance is NaN.")
            for name, failed in zip(measurement.metrics, failures, strict=True):
                error = measurement.errors.get(name)
                if not failed and images:
                    found, error = self._read(name, measurement.metrics[name], measurement.local)
                    measured |= found
                # What stands beside by default falls with the measurement itself, which is told.
                if (failed or error is not None) and not (name in self.built_in and failures[0]):
                    tell(name, error)
            suffix = f"/dataloader_idx_{index}" if len(known) > 1 else ""
            left_out = {f"{self.prefix}_{name}" for name in set(self.metrics) - set(measurement.metrics)}
            for family, names in self.families().values():
                for key in (family, f"{family}_se") if family not in left_out else ():
                    for name in names:
                        value = torch.as_tensor(measured.get(key, {}).get(name, torch.nan), dtype=torch.float32)
                        values[f"{key}/{name}{suffix}"] = value.to(device)
        return values

    def _read(
        self, name: str, metric: ModelMetric, local: LocalEquivarianceError
    ) -> tuple[dict[str, dict[str, Tensor]], Exception | None]:
        """All values and standard errors of a metric, by the text before the slash of their keys, and what failed.

        Each reading adds up over processes before it does anything else: all of them are made, whatever fails.
        """
        family = f"{self.prefix}_{name}"
        found: dict[str, dict[str, Tensor]] = {}
        error: Exception | None = None
        try:
            if not name and isinstance(metric, LocalEquivarianceError):
                for kind, by_name in metric.measures().items():
                    measure = kind.removesuffix("_standard_error")
                    behind = FAMILIES[measure][0] + ("_se" if kind != measure else "")
                    for key, value in by_name.items():
                        part, _, generator = key.rpartition("/")
                        family_of = self.prefix + (part and f"_{part}") + behind
                        found.setdefault(family_of, {})[generator] = value
                return found, None
            if name == "linearity" and isinstance(metric, FiniteEquivarianceError):
                found[family], found[f"{family}_se"] = metric.linearity(local)
                return found, None
            found[family] = metric.compute()
        except Exception as failure:
            error = failure
        if name:
            try:
                found[f"{family}_se"] = metric.standard_error()
            except Exception as failure:
                error = error or failure
        return found, error
