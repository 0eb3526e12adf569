"""Results of benchmarks in a CSV file, to which a long table is added piece by piece."""

import csv
import statistics
from pathlib import Path

# Ours, which are in the repository.
RESULTS = Path(__file__).with_name("results")


def read_results(path):
    """Read the results that are there, as dicts of str; a line that an interruption has cut short is left out."""
    if not path.is_file():
        return []
    # Line by line: one that is cut short within quotes would take the next ones in.
    fields, *lines = (next(csv.reader([line])) for line in path.read_text().split("\n"))
    return [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]


def append_result(path, result):
    """Add a result; the first one makes the file, with its fields as the columns."""
    before = path.read_text() if path.is_file() else ""
    fields = next(csv.reader([before.partition("\n")[0]])) if before else list(result)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if not before:
            writer.writeheader()
        elif not before.endswith("\n"):
            file.write("\n")
        writer.writerow(result)


def summary(values, scale, digits=2):
    """Mean, and standard deviation where there are several; values that were not measured are empty."""
    numbers = [scale * float(value) for value in values if value]
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"
