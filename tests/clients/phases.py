"""What users do with a finished run: each takes (client, its run under ds_quant, a function that runs it anew)."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from helpers.launching import launch


def resumed(client, done, again):
    """The Trainer goes on from the checkpoint at half of the steps, bit for bit."""
    run = again(client, "resumed", "--resume_from_checkpoint", str(done.output / "checkpoint-6"))
    assert len(run.losses) == 12
    assert run.losses[6:] == done.losses[6:]
    return "resumed bit for bit"


def loaded(client, done, again):
    """The script itself has loaded its checkpoint and gone on."""
    losses = [float(value) for value in re.findall(r"^again \d+: loss (\S+)$", done.printed, re.MULTILINE)]
    assert len(losses) == 6
    assert losses == done.losses[6:]
    return "loaded, goes on bit for bit"


def evaluated(client, done, again):
    """`--do_eval` alone on the saved model: the loss that the training run's own evaluation had, quantizers and all."""
    arguments = list(client.arguments)
    arguments[arguments.index("{assets}/llama")] = str(done.output)
    arguments.remove("--do_train")
    run = again(replace(client, arguments=tuple(arguments)), "evaluated")
    assert f"{client.linears} linear modules quantized" in " ".join(run.report)
    assert any(line.startswith("no optimizer was configured") for line in run.report), run.report
    losses = [json.loads((path / "eval_results.json").read_text())["eval_loss"] for path in (done.output, run.output)]
    assert abs(losses[0] - losses[1]) < 1e-6 * losses[0], losses
    return "--do_eval alone has the same loss"


def resized(client, done, again):
    """Another number of ranks is refused with a shell line, which makes a checkpoint that one rank resumes from."""
    one = replace(client, ranks=1)
    # The Trainer wants the batch of the run before.
    more = ("--resume_from_checkpoint", str(done.output / "checkpoint-6"), "--per_device_train_batch_size", "16")
    refused = again(one, "refused", *more, fails=True)
    fixes = set(re.findall(r"fix: run `(.+)` and load that with (\{?\"checkpoint\".+\})", refused.printed))
    assert len(fixes) == 1, refused.printed
    line, setting = fixes.pop()
    launch(["bash", "-c", line], timeout=200, env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    run = again(one, "resized", *more, config=json.loads(f"{{{setting}}}"))
    assert len(run.losses) == 12
    assert run.losses[:6] == done.losses[:6], "the Trainer's own record, from the checkpoint"
    # Step 7 sees the same rows and weights, moments quantized anew.
    learnt = done.losses[0] - done.losses[-1]
    assert abs(run.losses[6] - done.losses[6]) < 0.01 * learnt, (run.losses, done.losses)
    assert abs(run.losses[-1] - done.losses[-1]) < 0.1 * learnt, (run.losses, done.losses)
    return "resumed with one rank by the printed line"
