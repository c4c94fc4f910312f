"""What `launchers/gpu_check.py` runs: the acceptance on a GPU, one file a step.

Begin with `promises` (what is promised, and the verdict on each), `plan` (the steps and their times) and `running`
(each step in a process of its own). A step's file has a function `run(record)`; `recording` says what it may do.
"""
