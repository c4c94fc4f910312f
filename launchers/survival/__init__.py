"""How a run of launchers/pretrain.py ends clearly and goes on exactly, whatever happens to it.

Begin with `guard`: the checks between two steps, and `errors`: how a run can end, each with an exit status.

    signals     a request to stop becomes a checkpoint at the next step boundary
    control     what ranks agree on between steps; one that hears something tells the others
    watchdog    ends a rank that waits for one that is gone
    lease       one job at a time writes to an output folder; an older one is fenced off
    saving      checkpoints that are whole or not there, with digests; `checkpoints` finds and checks them
    resize      going on with another number of ranks, and `batches`: the same global batch
    status      status.json, for scripts; `ending` writes the last one
    disk        whether an error means that the disk is full

docs/survival.md is for users. tests/launchers/kill_points.py kills runs at any point.
"""
