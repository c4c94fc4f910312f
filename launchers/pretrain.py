"""Pre-train a causal language model with DeepSpeed, quantized as its JSON says.

deepspeed launchers/pretrain.py --deepspeed ds_configs/w8a8.json
"""

from __future__ import annotations

import sys

from pretraining import environment
from pretraining.errors import LaunchError


def main(argv: list[str] | None = None) -> int:
    """Run one pre-training job; returns the exit code."""
    environment.let_threads_sleep()
    environment.ensure_process_group_variables()
    use_cpu = environment.without_accelerator()

    # Imported here: they load deepspeed, which looks for its device when it is imported.
    from pretraining import job

    import ds_quant

    try:
        ds_quant.enable()
        job.run(sys.argv[1:] if argv is None else argv, use_cpu=use_cpu)
    except (LaunchError, ds_quant.ConfigError) as error:
        environment.complain(str(error))
        return 2
    finally:
        environment.leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
