"""What is fast beside what others do. `python launchers/benchmark.py` is the door; its commands are modules here.

`contenders` and the modules named `*_contenders` say who is compared, `timing` how they take turns, `results` what is
written.
"""
