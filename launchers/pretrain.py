"""Pre-train a causal language model with DeepSpeed, quantized as the JSON says.

deepspeed launchers/pretrain.py --deepspeed ds_configs/w8a8.json
"""

from __future__ import annotations

import sys

from pretraining import environment
from survival.errors import Diverged, LaunchError, RunEnded, Stopped, refuse
from survival.signals import StopAtOnce, StopRequest

from ds_quant.base.process_group import leave_process_group
from ds_quant.cli.shared import terminal


def main(argv: list[str] | None = None) -> int:
    """Run one pre-training job; returns the exit status.

    0: done. 2: wrong arguments. 3: diverged. 4: failed. 75: stopped by SIGUSR1 or SIGTERM, with a checkpoint to resume
    from. status.json in the output folder has the reason.
    """
    terminal.let_threads_sleep()
    try:
        environment.ensure_process_group_variables()
    except LaunchError as error:
        terminal.complain(str(error))
        return LaunchError.exit_status
    with environment.imports_left_alone():
        use_cpu = environment.without_accelerator()
    request = StopRequest()
    request.install()

    # Imported here because they load deepspeed, which looks for its device on import.
    try:
        with environment.imports_left_alone():
            from pretraining import job

            import ds_quant.engine  # which enable() would load later
    except StopAtOnce as stop:
        terminal.complain(str(stop))
        return Stopped.exit_status

    try:
        ds_quant.enable()
        job.run(sys.argv[1:] if argv is None else argv, use_cpu=use_cpu, request=request)
    except (LaunchError, ds_quant.ConfigError) as error:
        refuse(str(error))
        return LaunchError.exit_status
    except RunEnded as end:
        terminal.complain(str(end), everywhere=not isinstance(end, (Stopped, Diverged)))
        return end.exit_status
    except StopAtOnce as stop:
        terminal.complain(str(stop))
        return Stopped.exit_status
    finally:
        request.end()
        leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
