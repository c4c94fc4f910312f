"""Masters of 24 and 16 bits as tensors, and steps of them."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_quant import QuantAdamW
from ds_quant.config import ConfigError
from ds_quant.kernels import build
from ds_quant.numerics.master import join_master, round_weight, split_master
from ds_quant.numerics.random import derive_words, fold_words
from ds_quant.optim import base, items, master
from ds_quant.optim.lion import QuantLion
from ds_quant.optim.master import MasterTensor
from ds_quant.optim.state import QuantizedState
from ds_quant.optim.step_in_parts import StepInParts

FORMATS = {
    "8 bits": ({"bits": 8}, {"bits": 8}),
    "4 bits": ({"bits": 4}, {"bits": 4}),
    "32 bits": (None, None),
}


def masters_of(values, bits=24, *, is_stochastic=False):
    low_bits = torch.zeros(values.numel(), dtype=torch.int8) if bits == 24 else None
    made = MasterTensor(torch.zeros(values.numel(), dtype=torch.bfloat16), low_bits, is_stochastic=is_stochastic)
    made.copy_(values)
    return made


def values_of(rng, numel):
    return torch.from_numpy(rng.standard_normal(numel).astype("float32"))


def cut(values):
    """To 24 bits."""
    return join_master(*split_master(values))


def test_it_reads_and_writes_24_bits(rng):
    values = values_of(rng, 1001)
    masters = masters_of(values)
    assert masters.dtype == torch.bfloat16
    assert masters.stored_bytes == 1001
    assert torch.equal(masters.dequantize(), cut(values))
    assert torch.equal(masters + 0.0, cut(values))
    assert torch.equal(torch.cat([masters, masters]), cut(values).repeat(2))
    target = torch.empty(1001)
    target.copy_(masters)
    assert torch.equal(target, cut(values))
    assert torch.equal(masters.float(), cut(values))
    assert torch.equal(masters.to(torch.float32), cut(values))
    assert torch.equal(masters.weight, split_master(values)[0])
    masters.mul_(3.0)
    assert torch.equal(masters.dequantize(), cut(cut(values) * 3.0))


def test_a_window_reads_and_writes_its_part(rng):
    values, new = values_of(rng, 1000), values_of(rng, 60)
    masters = masters_of(values)
    window = masters.narrow(0, 100, 60).view(6, 10)
    assert type(window) is MasterTensor
    assert torch.equal(window.dequantize(), cut(values[100:160]).view(6, 10))
    window.data.copy_(new.view(6, 10))
    expected = cut(values)
    expected[100:160] = cut(new)
    assert torch.equal(masters.dequantize(), expected)
    fragment = torch.zeros(1000)
    fragment.narrow(0, 7, 60).data.copy_(window.data.view(-1))
    assert torch.equal(fragment[7:67], cut(new))


def test_the_model_sees_the_weights_in_its_own_memory(rng):
    flat = torch.zeros(2000, dtype=torch.bfloat16)
    masters = MasterTensor(flat[500:1500], torch.zeros(1000, dtype=torch.int8))
    values = values_of(rng, 1000)
    masters.copy_(values)
    assert torch.equal(flat[500:1500], split_master(values)[0])
    assert not flat[:500].any()
    assert torch.equal(masters.narrow(0, 10, 5).dequantize(), cut(values[10:15]))
    before = flat.clone()
    flat[500:1500].data.copy_(masters.data)  # what ZeRO does after a step
    assert torch.equal(flat, before)
    other = torch.zeros(1000, dtype=torch.bfloat16)
    other.copy_(masters)
    assert torch.equal(other, split_master(values)[0])


def test_it_is_saved_as_fp32(rng):
    values = values_of(rng, 1001)
    file = io.BytesIO()
    torch.save({"masters": masters_of(values)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["masters"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, cut(values))
    copied = copy.deepcopy(masters_of(values))
    assert torch.equal(copied.dequantize(), cut(values))


def reference(values, grads, formats, options, bits, is_stochastic):
    """Steps of an fp32 parameter, rounded to `bits` after each: the definition, for one part."""
    param = torch.nn.Parameter(values.clone())
    optimizer = QuantAdamW([param], **options, exp_avg=formats[0], exp_avg_sq=formats[1], seed=5)
    fold, part = base.fold_words, items.PART_STREAM
    base.fold_words = lambda *args, **kwargs: derive_words(fold(*args, **kwargs), part)
    try:
        for step, grad in enumerate(grads):
            param.grad = grad.float()
            optimizer.step()
            key = derive_words(derive_words(fold_words(5, step + 1), part), items.MASTER_STREAM)
            drawn = key if is_stochastic else None
            if bits == 24:
                param.data = join_master(*split_master(param.data, drawn))
            else:
                param.data = round_weight(param.data, drawn).float()
    finally:
        base.fold_words = fold
    return param.data


@pytest.mark.parametrize("is_stochastic", [False, True])
@pytest.mark.parametrize("bits", [24, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_is_that_of_fp32_rounded(name, bits, is_stochastic, rng):
    values = values_of(rng, 5001)
    masters = masters_of(values, bits, is_stochastic=is_stochastic)
    grads = [values_of(rng, 5001).bfloat16() for _ in range(4)]
    grads[1][17], grads[2][4000] = float("inf"), float("nan")
    options = {"lr": 1e-2, "weight_decay": 0.1}
    start = masters.dequantize()
    optimizer = QuantAdamW([torch.zeros(1)], **options, exp_avg=FORMATS[name][0], exp_avg_sq=FORMATS[name][1], seed=5)
    optimizer.param_groups[0]["params"] = [masters]  # as ZeRO replaces them
    for grad in grads:
        masters.grad = grad
        optimizer.step()
    expected = reference(start, grads, FORMATS[name], options, bits, is_stochastic)
    torch.testing.assert_close(masters.dequantize(), expected, rtol=0, atol=0, equal_nan=True)


def test_parts_draw_bits_of_their_own_and_states_are_cut_with_them(monkeypatch, rng):
    """Three parts, each as a parameter of its own that is stepped alone under the part's key."""
    monkeypatch.setattr(master, "PART_ELEMENTS", 4096)
    values, grad = values_of(rng, 10_000), values_of(rng, 10_000).bfloat16()
    masters = masters_of(values, 16, is_stochastic=True)
    start = masters.dequantize()
    formats = FORMATS["4 bits"]
    optimizer = QuantAdamW([torch.zeros(1)], lr=1e-2, exp_avg=formats[0], exp_avg_sq=formats[1], seed=5)
    optimizer.param_groups[0]["params"] = [masters]
    masters.grad = grad
    optimizer.step()
    key = fold_words(5, 1)
    for number, begin in enumerate(range(0, 10_000, 4096)):
        part = slice(begin, begin + 4096)
        monkeypatch.setattr(base, "fold_words", lambda *_, n=number, **__: derive_words(key, items.PART_STREAM + n))
        param = torch.nn.Parameter(start[part].clone())
        alone = QuantAdamW([param], lr=1e-2, exp_avg=formats[0], exp_avg_sq=formats[1], seed=5)
        param.grad = grad[part].float()
        alone.step()
        drawn = derive_words(derive_words(key, items.PART_STREAM + number), items.MASTER_STREAM)
        assert torch.equal(masters.dequantize()[part], round_weight(param.data, drawn).float())
        for name in ("exp_avg", "exp_avg_sq"):
            whole = optimizer.state[masters][name].dequantize()
            assert torch.equal(whole[part], alone.state[param][name].dequantize())


def stepped(masters, grads, formats):
    optimizer = QuantAdamW([torch.zeros(1)], lr=1e-2, exp_avg=formats[0], exp_avg_sq=formats[1], seed=5)
    optimizer.param_groups[0]["params"] = [masters]
    for grad in grads:
        masters.grad = grad
        optimizer.step()
    return optimizer.state[masters]


@pytest.mark.parametrize("bits", [24, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_fused_step_has_the_bits_of_one_in_fp32(name, bits, monkeypatch, rng):
    """Whole optimizers, with the kernel and without, over three parts."""
    monkeypatch.setattr(master, "PART_ELEMENTS", 2048)
    values = values_of(rng, 5001)
    grads = [values_of(rng, 5001).bfloat16() for _ in range(3)]
    grads[1][17], grads[2][4000] = float("inf"), float("nan")
    fused, plain = (masters_of(values, bits, is_stochastic=bits == 16) for _ in range(2))
    states = stepped(fused, grads, FORMATS[name])
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    expected = stepped(plain, grads, FORMATS[name])
    torch.testing.assert_close(fused.dequantize(), plain.dequantize(), rtol=0, atol=0, equal_nan=True)
    for moment in ("exp_avg", "exp_avg_sq"):
        found, right = (state[moment] for state in (states, expected))
        for one, other in zip(stored(found), stored(right), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def stored(moment):
    return moment.stored() if isinstance(moment, QuantizedState) else [moment]


class Largest(TorchDispatchMode):
    """The most bytes of memory that an operation's result brings."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if type(tensor) is torch.Tensor}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in given:
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return result


def test_the_fused_step_makes_no_tensor_of_its_size(monkeypatch, rng):
    if not build.load().library:
        pytest.skip(f"no C++ kernels: {build.load().reason}")
    masters = masters_of(values_of(rng, 5000))
    masters.grad = values_of(rng, 5000).bfloat16()
    optimizer = QuantAdamW([torch.zeros(1)], lr=1e-2, exp_avg={"bits": 8}, exp_avg_sq={"bits": 8})
    optimizer.param_groups[0]["params"] = [masters]
    optimizer.step()
    with Largest() as fused:
        optimizer.step()
    assert fused.num_bytes < 100
    monkeypatch.setenv("DS_QUANT_KERNELS", "reference")
    with Largest() as plain:
        optimizer.step()
    assert plain.num_bytes >= 4 * 5000


def put_in(optimizer, masters):
    """In place of the parameters of groups of one, as the engine does."""
    for group, param in zip(optimizer.param_groups, masters, strict=True):
        group["params"] = [param]


@pytest.mark.parametrize("kind", ["AdamW", "Lion"])
def test_a_step_in_parts_has_the_bits_of_a_whole_one(rng, monkeypatch, kind):
    """Of two tensors that are stepped part after part, the last one first, for two steps."""
    monkeypatch.setattr(master, "PART_ELEMENTS", 1024)
    gradients = [[values_of(rng, numel).bfloat16() for numel in (2500, 1100)] for _ in range(2)]
    gradients[0][0][:300] = 0.0
    gradients[0][0][1200], gradients[1][1][7] = float("inf"), float("nan")
    start = [values_of(rng, 2500), values_of(rng, 1100)]
    found = []
    for in_parts in (False, True):
        params = [masters_of(values, 24 if number else 16, is_stochastic=True) for number, values in enumerate(start)]
        groups = [{"params": [value.clone()], "lr": 1e-2 * (number + 1)} for number, value in enumerate(start)]
        if kind == "Lion":
            optimizer = QuantLion(groups, exp_avg={"bits": 8}, seed=3)
        else:
            optimizer = QuantAdamW(groups, exp_avg={"bits": 4}, exp_avg_sq={"bits": 8}, seed=3)
        put_in(optimizer, params)
        for grads in gradients:
            if in_parts:
                step = StepInParts(optimizer)
                for param, grad in reversed(list(zip(params, grads, strict=True))):
                    for number in reversed(range(param.num_parts)):
                        begin, end, _, _ = param.part(number)
                        step.step(param, number, grad[begin:end].clone())
                step.finish()
            else:
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
        states = [optimizer.state[param] for param in params]
        stored = [part for state in states for name in optimizer.STATES for part in state[name].stored()]
        found.append(
            [*(part for param in params for part in param.stored()), *stored, *(s["step"].view(1) for s in states)]
        )
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole.view(torch.uint8), parts.view(torch.uint8)), "bits, NaN included"


def test_hyperparameters_of_a_step_in_parts_stay(rng):
    param = masters_of(values_of(rng, 300))
    optimizer = QuantAdamW([torch.zeros(300)], lr=torch.tensor(0.5), exp_avg={"bits": 8}, exp_avg_sq={"bits": 8})
    put_in(optimizer, [param])
    step = StepInParts(optimizer)
    step.check_options()
    optimizer.param_groups[0]["lr"].fill_(0.25)
    with pytest.raises(ConfigError, match=r"lr of parameter group 0: got .*0\.25 after .* began with 0\.5"):
        step.check_options()
