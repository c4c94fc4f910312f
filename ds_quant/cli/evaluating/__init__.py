"""The parts of launchers/evaluate.py."""
