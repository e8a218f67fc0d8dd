"""The metrics of an audit: names, units and what they mean. One table; tables, alerts and reports take their words from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One of them.

    Attributes:
        name: As in audit files, histories and JSON.
        title: As tables and reports show it.
        meaning: Formula and scale, one sentence.
        per_block: Whether blocks have it too.
    """

    name: str
    title: str
    meaning: str
    per_block: bool


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "loss", "The objective L, with its own 1/N if it is a mean.", False),
        Metric("gradient_norm", "gradient norm", "|dL/dtheta|, Euclidean.", True),
        Metric("lambda_max", "largest eigenvalue", "Of H = d2L/dtheta2.", True),
        Metric("lambda_min", "smallest eigenvalue", "Of H; negative at a saddle.", True),
        Metric(
            "rate_limit", "learning-rate limit", "2 / lambda_max: gradient descent with a larger rate diverges.", False
        ),
        Metric("trace", "trace", "Sum of the eigenvalues of H.", True),
        Metric("frobenius", "Frobenius norm", "Square root of the sum of the squared eigenvalues of H.", True),
        Metric("effective_rank", "effective rank", "trace(H)^2 / |H|_F^2: how many equal eigenvalues would do.", True),
        Metric("stable_rank", "stable rank", "|H|_F^2 / |H|_2^2.", True),
        Metric(
            "negative_mass",
            "negative mass",
            "Share of the eigenvalues of H that are negative, from its density.",
            True,
        ),
        Metric("ggn_share", "GGN share", "trace(GGN) / (|trace(GGN)| + |trace(H - GGN)|).", False),
        Metric("kinks", "kinks", "Entries at which the loss has no derivative, at these data.", False),
        Metric("scaled_gradient", "scaled gradient", "max_i |g_i| max(|theta_i|, 1) / max(|L|, 1).", False),
        Metric("newton_decrement", "Newton decrement", "1/2 g^T (H + shift I)^-1 g in a Krylov space of g.", False),
        Metric("stop", "all stopping criteria hold", "1 or 0.", False),
    )
}
