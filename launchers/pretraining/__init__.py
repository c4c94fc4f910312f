"""The parts of `launchers/pretrain.py`, one idea a file."""
