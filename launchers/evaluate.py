"""`ds_quant evaluate` (docs/evaluate.md), run from a checkout."""

import sys

from ds_quant.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(prog="python launchers/evaluate.py"))
