"""How reports word runs and numbers; the dashboard words them alike."""

from services.contract.records import RunRecord


def run_setting(run: RunRecord) -> str:
    """What sets a run apart from the others of its method."""
    spec = run.spec
    return f"lr {spec.learning_rate!r} · bs {spec.batch_size} · seed {spec.seed}"


def mean_std(mean: float | None, std: float | None) -> str:
    """``61.20 ± 1.30``; the mean alone below two runs; a dash where there is none."""
    if mean is None:
        return "–"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def interval(low: float | None, high: float | None) -> str:
    """``+1.02 to +7.50``; a dash where there is none."""
    return "–" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def p_text(p_value: float | None) -> str:
    """``0.012``, ``< 0.001``; a dash where there is none."""
    if p_value is None:
        return "–"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
