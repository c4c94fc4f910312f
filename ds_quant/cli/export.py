"""`ds_quant export CHECKPOINT OUT`: what was trained, in a format that servers load.

With linears trained in W8A8, in fp8 or with few-bit weights alone, OUT is a compressed-tensors checkpoint: codes times
scale is the very weight that training multiplied by, and nothing is calibrated. With `--format bf16` it is
the same checkpoint in bf16, without quantizers.

OUT is written beside its place and renamed into it at the end.
"""

import argparse
import signal
import sys
from typing import Any, NoReturn

from ds_quant.base.errors import ConfigError
from ds_quant.export import FORMATS, export


def _leave(number: int, frame: Any) -> NoReturn:
    sys.exit(128 + number)


def main(arguments: list[str] | None = None, *, prog: str = "ds_quant_export") -> int:
    """Returns 0, or 2 for what ds_quant refuses and 1 for what the system does."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a folder of save_pretrained or the Trainer, such as runs/tiny/model")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--config", help="the DeepSpeed JSON of the training, where the checkpoint has no section")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _leave)  # by an exception, which removes the unfinished output
    try:
        report = export(options.checkpoint, options.out, config=options.config, format=options.format)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{prog}: {error}; nothing was left behind", file=sys.stderr)
        return 1
    for line in report.lines():
        print(line)
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
