"""The command `ds_quant`: what each of its commands reads and prints. Begin with command.py, which names them.

A command is a module with `main`. evaluate and diagnose have their parts in rooms of their own; what several commands
share is in shared/, for programs around the package too.
"""
