"""Hugging Face's parser of dataclasses, with readable errors."""

from __future__ import annotations

from typing import NoReturn

from survival.errors import LaunchError
from transformers import HfArgumentParser


class Parser(HfArgumentParser):
    """Raises LaunchError for what cannot be parsed."""

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage of about two hundred flags before the one line that matters.
        raise LaunchError(f"{message} (--help lists every flag)")
