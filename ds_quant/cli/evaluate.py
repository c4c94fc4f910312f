"""Evaluate checkpoints: perplexity and few-shot tasks, with the quantizers of the training, without, or with others.

    ds_quant evaluate runs/tiny --dataset python-source
    ds_quant evaluate runs/w8a8-s1 runs/baseline-s1 --quantizers trained off w4_channel.json \\
        --dataset paper --tasks paper --output results.json results.md

A row is a checkpoint with a choice of quantizers, a column a text or a task. Exit status: 0; 2 for what is refused,
with nothing written.
"""

from __future__ import annotations

import datetime
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_quant.cli.shared import tables, terminal
from ds_quant.cli.shared.errors import CommandError

if TYPE_CHECKING:
    from ds_quant.cli.evaluating.work import Work


def main(argv: list[str] | None = None, *, prog: str = "ds_quant evaluate") -> int:
    """Evaluate once and return the exit status. `prog`: the command name to record."""
    terminal.let_threads_sleep()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Forks of a process in which torch's threads run may hang: lm-eval is to bootstrap in this one.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported here: they load torch, whose threads are to know by then that they may sleep.
    from ds_quant.config import ConfigError

    try:
        _evaluate(sys.argv[1:] if argv is None else argv, prog)
    except (CommandError, ConfigError) as error:
        terminal.complain(str(error))
        return CommandError.exit_status
    except KeyboardInterrupt:
        terminal.complain("interrupted; nothing was written")
        return 128 + signal.SIGINT
    return 0


def _evaluate(argv: list[str], prog: str) -> None:
    from ds_quant.cli.evaluating import arguments

    asked = arguments.parse(argv, prog=prog.rpartition("/")[2], description=str(__doc__))

    from ds_quant.cli.evaluating import results, work

    tables.need_rich()
    terminal.quiet(verbose=False)
    planned = work.plan(asked)
    for note in planned.notes:
        terminal.say(note)
    rows = planned.run(terminal.say)
    averaged = results.means(rows, asked.baseline)
    settings = _settings(argv, prog, planned)
    results.show(rows, averaged)
    for path in asked.output:
        text = results.to_markdown(rows, averaged, settings, planned.notes)
        _write(path, results.to_json(rows, averaged, settings) if path.suffix == ".json" else text)
        terminal.say(f"written: {path}")


def _settings(argv: list[str], prog: str, planned: Work) -> dict[str, Any]:
    """All that the figures depend on."""
    import dataclasses

    from ds_quant.base.commit import commit
    from ds_quant.cli import report
    from ds_quant.cli.shared.loaded_model import KEY_SEED

    asked = planned.asked
    return {
        "command": f"{prog} {shlex.join(argv)}",
        "date": datetime.date.today().isoformat(),
        "commit": commit() or "unknown",
        "versions": {**report.versions(), **_version_of("lm_eval" if asked.tasks else None)},
        "settings": {
            **{key: value for key, value in dataclasses.asdict(asked).items() if key not in ("output", "overwrite")},
            "context_length": planned.context_length,
            "stride": planned.stride,
            "rounding_seed": KEY_SEED,
        },
        "texts": {text.name: text.source for text in planned.texts},
        "notes": planned.notes,
    }


def _version_of(package: str | None) -> dict[str, str]:
    from importlib.metadata import version

    return {} if package is None else {package: version(package)}


def _write(path: Path, content: dict[str, Any] | str) -> None:
    from ds_quant.base.whole_folder import write_json, write_whole

    try:
        if isinstance(content, str):
            write_whole(path, content)
        else:
            write_json(path, content)
    except OSError as error:
        raise CommandError(
            f"--output: got {path} ({error.strerror or error}); allowed: a file that can be written; give another"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
