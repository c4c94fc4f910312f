"""Parts of launchers/sweep.py."""
