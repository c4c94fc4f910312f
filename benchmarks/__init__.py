"""Parts of launchers/benchmark.py."""
