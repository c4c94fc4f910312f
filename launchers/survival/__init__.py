"""Lets a run of launchers/pretrain.py end with a clear state and resume exactly, whatever happens to it.

Begin with `guard`, the checks between two steps, and `errors`, the ways a run can end, each with an exit status.

    signals     a request to stop becomes a checkpoint at the next step boundary
    control     how ranks agree between steps; a rank that notices something tells the others
    watchdog    ends a rank that waits for a lost one
    lease       one job at a time writes to an output folder; older jobs are fenced off
    saving      writes checkpoints completely or not at all, with digests; `checkpoints` finds and checks them
    resize      resumes with another number of ranks; `batches` keeps the global batch
    status      status.json, for scripts; `ending` writes the final one
    disk        whether an error means that the disk is full

docs/survival.md is the user documentation. tests/launchers/kill_points.py kills runs at arbitrary points.
"""
