"""What a command ends with where it was asked for something that it cannot do."""


class CommandError(Exception):
    """An error in the command line or its files; the message says where, what was got and how to fix it."""

    exit_status = 2
