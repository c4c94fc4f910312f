"""The parts of `launchers/pretrain.py`, one topic per file."""
