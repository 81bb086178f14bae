"""How far a prediction is off: RMSE, and the score of the PHM 2008 challenge.

All values are remaining cycles. Both figures are given twice, with the truth capped at the value
at which the training target is capped, and uncapped: papers report either, and they differ by
more than most models do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

EARLY_CYCLES, LATE_CYCLES = 13.0, 10.0


def rmse(predicted: ArrayLike, true: ArrayLike) -> float:
    """The root of the mean squared error, in cycles; both arrays have shape (engines,)."""
    return float(np.sqrt(np.mean(_error(predicted, true) ** 2)))


def nasa_score(predicted: ArrayLike, true: ArrayLike) -> float:
    """The asymmetric score, summed over engines: 0 is perfect, and late is worse than early.

    With d = predicted - true: exp(-d/13) - 1 where d < 0, and exp(d/10) - 1 elsewhere.
    Source: A. Saxena, K. Goebel, D. Simon, N. Eklund, "Damage Propagation Modeling for Aircraft
    Engine Run-to-Failure Simulation", PHM 2008, equation 11.
    """
    error = _error(predicted, true)
    scale = np.where(error < 0, EARLY_CYCLES, LATE_CYCLES)
    return float(np.sum(np.expm1(np.abs(error) / scale)))


def report(predicted: ArrayLike, true: ArrayLike, cap: float) -> dict[str, float]:
    """RMSE and score against the truth capped at `cap` cycles, and against the truth as it is."""
    capped = np.minimum(np.asarray(true, dtype=np.float64), cap)
    return {
        "rmse_capped": rmse(predicted, capped),
        "rmse_uncapped": rmse(predicted, true),
        "score_capped": nasa_score(predicted, capped),
        "score_uncapped": nasa_score(predicted, true),
    }


def _error(predicted: ArrayLike, true: ArrayLike) -> np.ndarray:
    p, t = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if p.shape != t.shape or p.size == 0:
        raise ValueError(f"there are predictions of shape {p.shape} for truth of shape {t.shape}")
    return p - t
