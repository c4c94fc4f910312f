"""What ds_quant tells the user: one line each, from rank 0, on stderr.

Separate from DeepSpeed's logger, which is silent below warnings by default; `logging.getLogger("ds_quant")` takes the
usual settings.
"""

import logging
import os
import sys

logger = logging.getLogger("ds_quant")


def _set_up() -> None:
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if logger.handlers or logging.getLogger().handlers:
        return  # the program has arranged where its messages go
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Tell the user something worth knowing about the run."""
    if _is_first_rank():
        _set_up()
        logger.info(text)


def warn(text: str) -> None:
    """Tell the user something that is probably a mistake."""
    if _is_first_rank():
        _set_up()
        logger.warning(text)
