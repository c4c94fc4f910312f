"""Parts of launchers/collect.py."""
