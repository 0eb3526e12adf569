"""Results of benchmarks in a CSV file, to which a long table is added piece by piece."""

import csv
import statistics
from pathlib import Path

# Ours, which are in the repository.
RESULTS = Path(__file__).with_name("results")


def read_results(path):
    """Read the results that are there, as dicts of str."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_result(path, result):
    """Add a result; the first one makes the file, with its fields as the columns."""
    is_new = not path.is_file()
    fields = list(result)
    if not is_new:
        with path.open(newline="") as file:
            fields = next(csv.reader(file))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if is_new:
            writer.writeheader()
        writer.writerow(result)


def summary(values, scale, digits=2):
    """Mean, and standard deviation where there are several; values that were not measured are empty."""
    numbers = [scale * float(value) for value in values if value]
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"
