"""What benchmarks write."""

import csv

TIMED = {"seconds_p20", "seconds_p50", "seconds_p80", "ratio_p20", "ratio_p50", "ratio_p80", "speed_up", "rounds"}
PNG = b"\x89PNG"


def read(path):
    """The rows of a CSV."""
    with path.open() as file:
        return list(csv.DictReader(file))
