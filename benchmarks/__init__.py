"""What is fast beside what others do. `python launchers/benchmark.py` is the door; its commands are modules here.

`contenders` and the modules named `*_contenders` say who is compared, `choices` which of them a command line asks for,
`timing` how they take turns. Results are written by `ds_quant.cli.shared.tables`, and pictures of them by `charts`.
`cpu_calls` alone is a program of its own: it runs with another checkout's ds_quant, for one commit beside another.
"""
