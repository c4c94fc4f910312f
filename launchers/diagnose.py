"""`ds_quant diagnose` (docs/diagnostics.md, docs/planning.md), run from a checkout."""

import sys

from ds_quant.cli.diagnose import main

if __name__ == "__main__":
    sys.exit(main(prog="python launchers/diagnose.py"))
