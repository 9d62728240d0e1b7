"""Tell of a metric of held-out problems whether low or high values are good. docs/metrics.md says what each means."""

LOW = (
    "ece",
    "ece_over",
    "ece_10",
    "ece_adaptive",
    "smooth_ece",
    "brier",
    "reliability",
    "nll",
    "aurc",
    "malformed",
    "truncated",
    "unparseable",
    "timeout",
)
HIGH = ("accuracy", "auroc", "resolution", "accuracy_at_half", "coverage")
LOW_FAMILIES = ("malformed/", "unanswered/")
HIGH_FAMILIES = ("reward/", "scaling/")


def low_is_good(key: str, metric: str, prefix: str) -> bool:
    """Tell whether low values of a metric are good.

    Args:
        key: of the configuration, for the message.
        metric: its full name, such as val/ece.
        prefix: of the metrics of held-out problems.

    Raises:
        ValueError: one sentence, for a metric of which neither is known.
    """
    start, _, name = metric.partition("/")
    if name.startswith("attempt_"):
        name = name.partition("/")[2]
    if start == prefix:
        if name in LOW or name.startswith(LOW_FAMILIES):
            return True
        if name in HIGH or name.startswith(HIGH_FAMILIES):
            return False
    known = ", ".join(f"{prefix}/{name}" for name in (*HIGH, *LOW, "reward/<objective>", "malformed/<objective>"))
    raise ValueError(f"{key}={metric}: of this metric it is not known whether low or high is good; choose from {known}")
