"""Run an unchanged script with ds_quant enabled.

    python -m ds_quant train.py ARGS              deepspeed --module ds_quant train.py ARGS
    python -m ds_quant -m package.train ARGS      accelerate launch -m ds_quant train.py ARGS

Launchers put options of their own, such as DeepSpeed's --local_rank=N, before the script's name: those are passed on
to the script, in front of its own.
"""

import atexit
import os
import runpy
import sys

USAGE = "usage: python -m ds_quant [launcher options] SCRIPT [ARGS ...]\n       python -m ds_quant -m MODULE [ARGS ...]"


def split_arguments(arguments: list[str]) -> tuple[list[str], str | None, bool, list[str]]:
    """(options of the launcher, script or module or None, whether it is a module, its arguments)."""
    leading: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "-m":
            module = arguments[index + 1] if index + 1 < len(arguments) else None
            return leading, module, True, arguments[index + 2 :]
        if not argument.startswith("-"):
            return leading, argument, False, arguments[index + 1 :]
        leading.append(argument)
    return leading, None, False, []


def _one_rank_without_a_launcher() -> None:
    """Without a launcher DeepSpeed asks MPI for the ranks, and ends in an error on mpi4py where that is missing."""
    from ds_quant.base.process_group import RANK_VARIABLES, become_one_rank

    # A script that reads srun's own variables makes ranks of its tasks itself.
    if not any(name in os.environ for name in (*RANK_VARIABLES, "SLURM_STEP_NUM_TASKS")):
        become_one_rank()


def _say_if_nothing_was_quantized(target: str) -> None:
    """Warn at exit if the script never called deepspeed.initialize: it may have trained unquantized."""
    from ds_quant import engine
    from ds_quant.base.log import warn

    if not engine.was_called():
        warn(
            f"nothing was quantized by a config: {target} never called deepspeed.initialize, so the ds_quant "
            "section of its config, if it has one, was not read. Hand the config to the Trainer (--deepspeed FILE), to "
            "accelerate (deepspeed_config_file) or to deepspeed.initialize"
        )


def main() -> int:
    leading, target, is_module, rest = split_arguments(sys.argv[1:])
    if {"-h", "--help"} & set(leading):
        print(f"{__doc__}\n{USAGE}")
        return 0
    if target is None:
        print(f"ds_quant: got no script; allowed: a script or -m MODULE; fix:\n{USAGE}", file=sys.stderr)
        return 2
    if not is_module and not os.path.isfile(target):
        print(
            f"ds_quant: got the script {target!r}, which is no file (working directory {os.getcwd()}); allowed: a "
            "Python file; fix: correct the path, or use -m for a module",
            file=sys.stderr,
        )
        return 2

    import ds_quant
    from ds_quant.base.process_group import leave_process_group

    try:
        ds_quant.enable()
    except ds_quant.ConfigError as error:
        print(f"ds_quant: {error}", file=sys.stderr)
        return 2
    _one_rank_without_a_launcher()
    atexit.register(_say_if_nothing_was_quantized, target)
    # What is registered first runs last: what the script leaves for the end may still meet the other ranks.
    atexit.register(leave_process_group)
    sys.argv = [target, *leading, *rest]
    try:
        if is_module:
            # As `python -m`: the working directory, where this process found it, stays first on the path.
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(target))
            runpy.run_path(target, run_name="__main__")
    except BaseException as end:
        if not isinstance(end, SystemExit) or end.code:
            atexit.unregister(leave_process_group)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
