"""Expressions that several panels are made of."""

RATE = "[$__rate_interval]"


def rate(counter: str) -> str:
    """Per second, over all label values."""
    return f"sum(rate({counter}{RATE}))"


def rate_by(label: str, counter: str) -> str:
    """Per second, for each value of a label."""
    return f"sum by ({label}) (rate({counter}{RATE}))"


def increase_by(labels: str, counter: str) -> str:
    """How many there were, for each value of the labels."""
    return f"sum by ({labels}) (increase({counter}{RATE}))"


def quantiles(histogram: str) -> dict[str, str]:
    """Half of the requests, and the slow ones."""
    return {
        f"p{percent}": f"histogram_quantile({percent / 100:g}, sum by (le) (rate({histogram}_bucket{RATE})))"
        for percent in (50, 95, 99)
    }


def mean(histogram: str) -> str:
    """What one took on average."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"
