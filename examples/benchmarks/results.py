"""Results of benchmarks in a CSV file, to which a long table is added piece by piece."""

import csv
import io
import statistics
from pathlib import Path

# Ours, which are in the repository.
RESULTS = Path(__file__).with_name("results")


def read_results(path):
    """Read the results that are there, as dicts of str; a line that an interruption has cut short is left out."""
    return list(csv.DictReader(io.StringIO(_whole_lines(path).decode(), newline="")))


def append_result(path, result):
    """Add a result; the first one makes the file, with its fields as the columns."""
    before = _whole_lines(path)
    fields = next(csv.reader([before.decode().partition("\n")[0]])) if before else list(result)
    with path.open("a", newline="") as file:
        file.truncate(len(before))
        writer = csv.DictWriter(file, fields)
        if not before:
            writer.writeheader()
        writer.writerow(result)


def _whole_lines(path):
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def summary(values, scale, digits=2):
    """Mean, and standard deviation where there are several; values that were not measured are empty."""
    numbers = [scale * float(value) for value in values if value]
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"
