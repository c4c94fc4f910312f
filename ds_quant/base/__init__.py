"""What every subpackage uses: errors, messages, patterns of names, whole files, and checks of files before use.

Begin with `errors` (ConfigError, and how its messages are built) and `whole_folder` (files and folders, written whole).
"""
