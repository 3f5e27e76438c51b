"""The cost model of graphopt: a roofline from layered files, times a learned residual.

The engine's `CostModel`. Deliberately absent: watching the files (the service does), and measuring.
"""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path

from cost_models.coefficients import Coefficients, layer_paths, read_layers
from cost_models.residual import Residual
from cost_models.roofline import Roofline, Terms
from graphopt.costs.model import Effective, Prediction
from graphopt.costs.work import Work
from graphopt.engine.fingerprint import host_fingerprint
from graphopt.executor.backend import Options

GIVEN = "given"  # origin of a coefficient that no file has
CALIBRATION = "calibration"  # folder in the state folder
BAND = 1.645  # standard deviations on either side of nine in ten


class HostModel:
    """Predicts from files and from what was observed.

    Args:
        calibration: the host's own layer; it may be missing.
        operator: folder of the operator's layers; it may be missing.

    Raises DocumentError.
    """

    def __init__(self, calibration: Path | None = None, operator: Path | None = None) -> None:
        self._calibration, self._operator = calibration, operator
        self._effective: tuple[Effective, ...] | None = None
        self._take(read_layers(layer_paths(calibration, operator)), Residual())

    def predict(self, work: Work, backend: str, options: Options) -> Prediction | None:
        """Seconds of one call; None where no layer knows the backend."""
        roofline, residual = self._parts
        terms = roofline.terms(work, backend, options.threads)
        if terms is None:
            return None
        correction = residual.correction(work, terms, backend)
        seconds = terms.seconds * exp(correction.mean)
        spread = exp(BAND * correction.deviation)
        objective_s = seconds + self._weighed(terms, options.threads, seconds)
        return Prediction(seconds, seconds / spread, seconds * spread, objective_s)

    def observe(self, work: Work, backend: str, options: Options, seconds: float) -> None:
        """Learns from a measured median; without coefficients for the backend there is nothing to
        correct, and nothing is kept.
        """
        roofline, residual = self._parts
        terms = roofline.terms(work, backend, options.threads)
        if terms is not None:
            residual.observe(work, terms, backend, options, seconds)

    def reload(self) -> Sequence[str]:
        """Reads the files again, whole or not at all; what was observed is kept."""
        return self.take(self.read(self._operator), self._operator)

    def read(self, operator: Path | None) -> Coefficients:
        """The coefficients with the operator's layers from a folder, without taking them over.

        Raises DocumentError.
        """
        return read_layers(layer_paths(self._calibration, operator))

    def take(self, found: Coefficients, operator: Path | None) -> Sequence[str]:
        """Takes over what `read` read; names of the coefficients that changed."""
        self._operator = operator
        changed = self.coefficients.changed(found)
        if changed or found.origins != self.coefficients.origins:
            self._take(found, self._parts[1])
        return changed

    def effective(self) -> Sequence[Effective]:
        """Every coefficient in force, by name."""
        if self._effective is None:
            self._effective = tuple(self.coefficients.effective())
        return self._effective

    def assume(self, values: Mapping[str, float]) -> None:
        """Takes these coefficients in place of all files, and forgets what was observed."""
        self._take(Coefficients(dict(values), dict.fromkeys(values, GIVEN)), Residual())

    @property
    def coefficients(self) -> Coefficients:
        """The coefficients in force."""
        return self._coefficients

    def _take(self, coefficients: Coefficients, learned: Residual) -> None:
        roofline = Roofline(coefficients)
        self._effective = None
        self._coefficients = coefficients
        self._parts = (roofline, learned.under(roofline))  # one reference: old or new, never both

    def _weighed(self, terms: Terms, threads: int, seconds: float) -> float:
        """What the resources are worth: alpha a core-second, beta a second of the memory bus."""
        alpha = self._coefficients.get("weights", "alpha") or 0.0
        beta = self._coefficients.get("weights", "beta") or 0.0
        return alpha * threads * seconds + beta * min(terms.memory_s, seconds)


def default(state: Path | None) -> HostModel:
    """The model with what was calibrated in a state folder. Raises DocumentError."""
    return HostModel(calibration_path(state) if state is not None else None)


def calibration_path(state: Path) -> Path:
    """Where the layer of this host lies in a state folder."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in host_fingerprint())
    return state / CALIBRATION / f"{name}.yaml"
