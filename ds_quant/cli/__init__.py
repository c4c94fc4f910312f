"""The commands that come with the package: each module has a `main` that takes arguments and returns an exit status."""
