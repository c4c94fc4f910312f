"""The commands of launchers/diagnose.py."""
