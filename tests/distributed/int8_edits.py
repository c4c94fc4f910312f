"""Edits of weights between micro batches or steps, after codes were made of the weights that they replace."""

import deepspeed
import torch
from common import forward
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from int8_training import EARLY, ROWS, STEPS, micro_batch, train, weights_digest

PROBE = 1000
"""A batch that no step trains on."""
EDITED = "model.layers.0.mlp.up_proj.weight"


def probe(engine):
    """The loss of a batch, by the module itself: no step, no gradients, but codes are kept as training keeps them."""
    with torch.no_grad():
        return forward(engine.module, PROBE, ROWS).item()


# Weights are edited alike on all ranks: below stage 3 each holds its own copy.


def _load_checkpoint(engine, start):
    engine.load_checkpoint(start["folder"])


def _load_module(engine, start):
    def load(src, dst):  # as DeepSpeed's own steps write, with no trace in a version
        for name, parameter in dst.named_parameters():
            parameter.data.copy_(src[name])

    engine.load_module_state_dict({"module": start["module"]}, custom_load_fn=load)


def _set_fp32(engine, start):
    parameter = engine.module.get_parameter(EDITED)
    value = safe_get_full_fp32_param(parameter)
    if value is None:
        return False  # stage 0 has no such copy, or not where DeepSpeed looks for it
    value = 3.0 * value
    safe_set_full_fp32_param(parameter, value)
    assert torch.equal(safe_get_full_fp32_param(parameter), value)
    return True


def _gathered(engine, start):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        engine.module.get_parameter(EDITED).data.mul_(3.0)


def _in_place(engine, start):
    with torch.no_grad():
        engine.module.get_parameter(EDITED).mul_(3.0)


def _evaluate(engine, start, swap, swap_back):
    """Losses of an evaluation before the swap, of other weights, and after it."""
    parameter = engine.module.get_parameter(EDITED)
    engine.eval()
    losses = [probe(engine)]
    own = swap(parameter)
    losses.append(probe(engine))
    swap_back(parameter, own)
    losses.append(probe(engine))
    engine.train()
    return losses


def _evaluate_copies(engine, start):
    def swap(parameter):
        own = parameter.data.clone()
        parameter.data.copy_(-own)
        return own

    return _evaluate(engine, start, swap, lambda parameter, own: parameter.data.copy_(own))


def _evaluate_others(engine, start):
    def swap(parameter):
        own, parameter.data = parameter.data, -parameter.data
        return own

    return _evaluate(engine, start, swap, lambda parameter, own: setattr(parameter, "data", own))


EDITS = {
    "load_checkpoint": _load_checkpoint,
    "load_module_state_dict": _load_module,
    "safe_set_full_fp32_param": _set_fp32,
    "GatheredParameters": _gathered,
    "in place": _in_place,
    "evaluation of copies": _evaluate_copies,
    "evaluation of others": _evaluate_others,
}


def edited(engine, name, start, counts):
    """One edit, after codes were made of the weights that it replaces. A checkpoint is loaded between two steps, all
    else happens between two micro batches of one."""
    index = 100 + 10 * list(EDITS).index(name)
    losses = []
    if name != "load_checkpoint":
        losses.append(micro_batch(engine, index))
    before, norm = probe(engine), engine.module.get_parameter(EDITED).detach().float().norm().item()
    counts.take()
    result = EDITS[name](engine, start)
    taken = counts.take()
    after = probe(engine)
    report = {"before": before, "after": after, "result": result, "counts": taken, "counts after": counts.take()}
    if name == "load_checkpoint":
        return report | train(engine, EARLY, STEPS)
    losses.append(micro_batch(engine, index + 1))
    weights = [weights_digest(engine)]
    report["norms"] = [norm, engine.module.get_parameter(EDITED).detach().float().norm().item()]
    more = train(engine, index + 2, index + 3)
    return report | {"losses": losses + more["losses"], "weights": weights + more["weights"]}


def skipped(engine):
    """A step that DeepSpeed skips, since a gradient is infinite."""
    before, weights = engine.skipped_steps, [weights_digest(engine)]
    losses = [micro_batch(engine, 500), micro_batch(engine, 501, factor=float("inf"))]
    weights.append(weights_digest(engine))
    report = {"skipped": engine.skipped_steps - before}
    more = train(engine, 251, 253)
    return report | {"losses": losses + more["losses"], "weights": weights + more["weights"]}
