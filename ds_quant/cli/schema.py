"""`ds_quant schema`: the JSON schema of the `ds_quant` section, for editors and for checks without ds_quant."""

import argparse
import json
import sys


def main(arguments: list[str] | None = None, *, prog: str = "ds_quant schema") -> int:
    argparse.ArgumentParser(prog=prog, description=__doc__).parse_args(arguments)
    show()
    return 0


def show() -> None:
    """Print the schema."""
    from ds_quant.config import json_schema

    print(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
