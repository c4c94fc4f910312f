"""What is alive of the weights during and after a forward."""

import gc

import torch
from common import forward
from int8_training import ACCUMULATION, ROWS, build, quantized_layers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most elements alive at once: of codes of weights' shapes, of others of these shapes, and of `weights`."""

    def __init__(self, weights, shapes):
        super().__init__()
        self._weights, self._shapes = weights, shapes
        self.begin()

    def begin(self):
        self._storages = {"codes": set(), "others": set()}
        self._most = {"codes": 0, "others": 0, "gathered": 0}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self._shapes:
                storage = StorageWeakRef(tensor.untyped_storage())
                kind = "codes" if tensor.dtype == torch.int8 else "others"
                self._storages[kind].add((storage, tensor.numel()))
        for kind, storages in self._storages.items():
            storages -= {entry for entry in storages if entry[0].expired()}
            self._note(kind, sum(numel for _, numel in storages))
        self._note("gathered", sum(weight.numel() for weight in self._weights))
        return result

    def _note(self, kind, numel):
        self._most[kind] = max(self._most[kind], numel)

    def end(self):
        return self._most


def alive(shapes):
    """[shape, dtype] of each tensor of these shapes that was made since gc.freeze(), wherever it is."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return [[list(tensor.shape), str(tensor.dtype)] for tensor in tensors if tuple(tensor.shape) in shapes]


def held(loss, numels):
    """[what, dtype] of each tensor of these sizes that the graph of `loss` holds for its backward."""
    found, seen, nodes = [], set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        things = {name: getattr(node, name) for name in dir(node) if name.startswith("_saved")}
        things |= {"saved_tensors": getattr(node, "saved_tensors", ()), **getattr(node, "__dict__", {})}
        for name, thing in things.items():
            for tensor in tree_leaves(thing):
                if isinstance(tensor, torch.Tensor) and tensor.numel() in numels:
                    found.append([f"{node.name()}.{name}", str(tensor.dtype)])
    return found


def watch_memory(path, case):
    """What is alive of the weights during and after a forward."""
    engine = build(path, case)
    # Under ZeRO-3 a Parameter's own shape tells whether it is gathered.
    matrices = [parameter for parameter in engine.module.parameters() if len(_shape(parameter)) == 2]
    shapes = {shape for p in matrices for shape in (_shape(p), _shape(p)[::-1])}
    numels = {rows * columns for rows, columns in shapes}
    layers = quantized_layers(engine)
    # Looked up once: during a forward, DeepSpeed gathers what is looked up in a module.
    weights = {layer: layer.weight for layer in layers}
    report = {
        "largest": max(numels),
        "largest quantized": max(torch.Size(_shape(weight)).numel() for weight in weights.values()),
        "layers": [],
        "steps": [],
    }

    def look(layer, inputs, output):
        gathered = sum(parameter.numel() for parameter in matrices)
        report["layers"].append({"alive": alive(shapes), "weight": weights[layer].numel(), "gathered": gathered})

    def pack(tensor):
        if tensor.numel() in numels:
            report["packed"].append(any(tensor.data_ptr() == parameter.data_ptr() for parameter in matrices))
        return tensor

    gc.collect()
    gc.freeze()
    handles = [layer.register_forward_hook(look) for layer in layers]
    loss = forward(engine, 0, ROWS)
    for handle in handles:
        handle.remove()
    report["after"] = {
        "alive": alive(shapes),
        "gathered": [parameter.numel() for parameter in engine.module.parameters()],
        "held": held(loss, numels),
        "kept": sum(layer._weight_codes._codes is not None for layer in layers),
    }
    gc.unfreeze()
    engine.backward(loss)
    engine.step()
    report["packed"] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(engine, 1, ROWS)
    engine.backward(loss)
    engine.step()
    del loss
    with Live(matrices, shapes) as live:
        for micro in range(ACCUMULATION):
            live.begin()
            loss = forward(engine, micro, ROWS)
            in_forward = live.end()
            live.begin()
            engine.backward(loss)
            report["steps"].append({"forward": in_forward, "backward": live.end()})
            engine.step()
            del loss
    engine.destroy()
    return report


def _shape(parameter):
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
