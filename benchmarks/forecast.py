"""How well arrivals are forecast on a real trace: a CSV file, gzipped or not, with a line for each request.

    python benchmarks/forecast.py TRACE.csv.gz [--column TIMESTAMP] [--horizon 30] [--quantile 0.9]

The trace is played second by second; every ten seconds the mean rate from one horizon ahead to two is forecast and
compared with what came. The Azure traces of 2023 have this form: github.com/Azure/AzurePublicDataset (CC-BY 4.0).
"""

import argparse
import csv
import gzip
import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoscaler_svc.arrivals import ArrivalHistory
from autoscaler_svc.forecast import forecast

WARM_UP_S, EVERY_S = 600, 10
BASE_S = 1_764_028_800.0  # any midnight


def seconds_of(path: Path, column: str) -> Iterator[float]:
    """When each request came, in Unix seconds."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for row in csv.DictReader(file):
            yield datetime.fromisoformat(row[column][:26]).timestamp()


def counts_of(path: Path, column: str) -> list[int]:
    """Requests in each second from the first on."""
    moments = sorted(seconds_of(path, column))
    counts = [0] * (int(moments[-1] - moments[0]) + 1)
    for moment in moments:
        counts[int(moment - moments[0])] += 1
    return counts


def play(counts: list[int], horizon_s: int, quantile: float) -> Table:
    """Forecast again and again, and compare."""
    history = ArrivalHistory()
    history.note(BASE_S, 0)
    errors, within, times = [], [], []
    for second, count in enumerate(counts[: len(counts) - 2 * horizon_s], start=1):
        history.note(BASE_S + second, count)
        if second < WARM_UP_S or second % EVERY_S:
            continue
        began_at = time.perf_counter()
        expected = forecast(history, BASE_S + second, horizon_s, quantile)
        times.append(time.perf_counter() - began_at)
        came = statistics.fmean(counts[second + horizon_s : second + 2 * horizon_s])
        within.append(came <= expected.high)
        if came:
            errors.append(abs(expected.mean - came) / came)
    table = Table("horizon", "forecasts", "mean error", f"within the quantile {quantile:g}", "time of one", box=None)
    table.add_row(
        f"{horizon_s} s",
        str(len(within)),
        f"{statistics.fmean(errors):.1%}",
        f"{statistics.fmean(within):.1%}",
        f"{1e3 * statistics.median(times):.1f} ms",
    )
    return table


def main() -> None:
    """Play the trace that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--column", default="TIMESTAMP")
    parser.add_argument("--horizon", type=int, default=30, metavar="SECONDS")
    parser.add_argument("--quantile", type=float, default=0.9)
    options = parser.parse_args()
    Console().print(play(counts_of(options.trace, options.column), options.horizon, options.quantile))


if __name__ == "__main__":
    main()
