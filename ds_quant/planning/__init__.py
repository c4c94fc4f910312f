"""What a training job will need, found out by running its own code without arithmetic.

Begin with `plan` (what fits on given hardware, and the least that is enough). It asks `predict`, which has `worker` run
each job (`job`) as a dry run; `dry_run` says how code runs without arithmetic, `ledger` whose memory is whose, and
`traffic` what is sent.
"""
