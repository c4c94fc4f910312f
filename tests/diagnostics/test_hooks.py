"""Recorders see what the layers saw, once, and change nothing."""

import pytest
import torch
from small_models import TwoLayers, batch, converted, gpt2, llama
from torch import nn

import ds_quant
from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.gradient_error import GradientErrorRecorder
from ds_quant.diagnostics.gradient_norms import GradientNormRecorder
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.oscillation import OscillationRecorder
from ds_quant.diagnostics.outliers import OutlierRecorder
from ds_quant.diagnostics.quantization_error import QuantizationErrorRecorder
from ds_quant.diagnostics.recorder import Recorder
from ds_quant.linear.convert import step_key_of


class Listing(Recorder):
    """Keeps everything that it is shown."""

    kind = "outliers"
    watches_inputs = watches_output_gradients = watches_parameter_gradients = True

    def __init__(self):
        super().__init__()
        self.inputs, self.gradients, self.parameters = [], [], {}

    def observe_input(self, name, module, x):
        assert not torch.is_grad_enabled()
        self.inputs.append((name, x))

    def observe_grad_output(self, name, module, x, grad_output):
        self.gradients.append((name, x, grad_output))

    def observe_parameter_grad(self, name, grad):
        self.parameters[name] = grad.clone()


def every_recorder():
    recorders = (OutlierRecorder, GradientErrorRecorder, GradientNormRecorder, QuantizationErrorRecorder)
    return [*(cls() for cls in recorders), OscillationRecorder()]


def train_step(model, recorders=()):
    """Loss and gradients of one step, with the same dropout and the same random rounding each time."""
    step_key_of(model).set(0)
    torch.manual_seed(5)
    model.zero_grad()
    if recorders:
        with attach(model, recorders):
            loss = model(**batch()).loss
            loss.backward()
    else:
        loss = model(**batch()).loss
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def hooks_of(model):
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules, sum(len(p._backward_hooks or {}) for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_look_changes_no_bit_and_measures_the_same_under_checkpointing(make, checkpointing):
    model = converted(make()).train()
    plain = every_recorder()
    with_dropout = train_step(model, plain)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    before, (loss, grads) = hooks_of(model), train_step(model)
    recorders = every_recorder()
    looked_loss, looked_grads = train_step(model, recorders)
    assert torch.equal(loss, looked_loss)
    assert all(torch.equal(grad, looked_grads[name]) for name, grad in grads.items())
    assert torch.equal(with_dropout[0], loss)
    assert hooks_of(model) == before
    for one, other in zip(recorders, plain, strict=True):
        assert one.result(1) == other.result(1)


def test_what_is_observed_is_what_the_layers_computed_with():
    torch.manual_seed(0)
    model, x = TwoLayers(), torch.randn(5, 8)
    seen = Listing()
    with attach(model, [seen]):
        model(x).square().sum().backward()
    y = 2 * model.first(x)
    assert [name for name, _ in seen.inputs] == ["first", "second"]
    assert torch.equal(seen.inputs[0][1], x)
    assert torch.equal(seen.inputs[1][1], y)
    g = 2 * model.second(y)
    (second, first) = seen.gradients
    assert [second[0], first[0]] == ["second", "first"]
    torch.testing.assert_close(second[2], g)
    torch.testing.assert_close(first[2], 2 * g @ model.second.weight)  # before the change in place
    assert torch.equal(first[1], x)
    for name, parameter in model.named_parameters():
        assert torch.equal(seen.parameters[name], parameter.grad)
    torch.testing.assert_close(second[2].t() @ second[1], model.second.weight.grad)


def test_inputs_come_in_the_dtype_of_the_product_and_arithmetic_is_not_autocast():
    model, x = TwoLayers(), torch.randn(5, 8)
    seen = Listing()
    with attach(model, [seen]), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
    assert [value.dtype for _, value in seen.inputs] == [torch.bfloat16] * 2
    assert [value.dtype for _, value, _ in seen.gradients] == [torch.bfloat16] * 2

    class Product(Listing):
        def observe_input(self, name, module, x):
            self.inputs.append((name, x.float() @ x.float().t()))

    product = Product()
    with attach(model, [product]), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert product.inputs[0][1].dtype == torch.float32


def test_layers_without_gradients_and_evaluations_are_observed_too():
    model, seen = TwoLayers(), Listing()
    with attach(model, [seen]), torch.no_grad():
        model(torch.randn(5, 8))
    assert len(seen.inputs) == 2
    assert not seen.gradients


def test_hooks_go_when_an_error_ends_the_look():
    model = TwoLayers()
    with pytest.raises(RuntimeError), attach(model, [Listing()]):
        model(torch.randn(5, 3))
    assert hooks_of(model) == (0, 0)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match=r"LayerNorm.*register_module"), attach(nn.LayerNorm(3), []):
        pass


@pytest.mark.parametrize("recorder", every_recorder(), ids=lambda recorder: recorder.kind)
def test_ranks_that_add_up_their_sums_have_the_measurement_of_the_whole_batch(recorder):
    whole, part = type(recorder)(), [type(recorder)(), type(recorder)()]
    model = converted(llama(attention_dropout=0.0)).eval()
    step_key_of(model).set(0)
    halves = [{key: value[rows] for key, value in batch().items()} for rows in (slice(0, 2), slice(2, 4))]
    for half, own in zip(halves, part, strict=True):
        for recorders in ([whole], [own]):
            with attach(model, recorders):
                model(**half).loss.backward()
            model.zero_grad()
    assert [t.shape for t in part[0].sums()] == [t.shape for t in part[1].sums()]
    for one, other in zip(part[0].sums(), part[1].sums(), strict=True):
        one += other
    for one, other in zip(part[0].maxima(), part[1].maxima(), strict=True):
        one.copy_(torch.maximum(one, other))
    joined, expected = part[0].result(3), whole.result(3)
    if recorder.kind == "oscillation":  # two looks in one case, and in the other one look of two ranks
        assert joined.scalars["near_threshold"] == pytest.approx(expected.scalars["near_threshold"])
        return
    assert joined.scalars == pytest.approx(expected.scalars)
    assert [pytest.approx(row) for row in joined.rows] == expected.rows


@pytest.mark.parametrize("recorder", every_recorder(), ids=lambda recorder: recorder.kind)
def test_a_look_at_nothing_is_an_error_and_reset_begins_anew(recorder):
    model = converted(llama()).eval()
    with attach(model, [recorder]):
        pass
    with pytest.raises(ConfigError, match="no call of any linear layer"):
        recorder.result(0)
    for _ in range(2):
        recorder.reset()
        with attach(model, [recorder]):
            model(**batch()).loss.backward()
        found = recorder.result(7)
        assert found.step == 7
        assert found.kind == recorder.kind
        if recorder.kind == "outliers":
            assert found.settings["tokens"] == 4 * 16


def test_at_zero_3_the_weight_is_whole_wherever_a_recorder_is_called(single_rank):
    model = TwoLayers()
    config = {
        "train_micro_batch_size_per_gpu": 5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {
            "ds_quant_required": True,
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # Each weight is released as soon as its layer is done.
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "ds_quant": {"linear": {"weight": {"bits": 8}}},
    }
    engine, *_ = ds_quant.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(2):  # until DeepSpeed knows the order of the layers, it keeps weights for longer
        engine.backward(engine(torch.randn(5, 8)).square().sum())
        engine.step()
    shapes = []

    class Weights(Listing):
        def observe_input(self, name, module, x):
            shapes.append((name, "forward", tuple(module.weight.shape)))

        def observe_grad_output(self, name, module, x, grad_output):
            shapes.append((name, "backward", tuple(module.weight.shape)))

    seen = Weights()
    recorders = [OutlierRecorder(), QuantizationErrorRecorder(), OscillationRecorder(), GradientNormRecorder()]
    with attach(engine.module, [seen, *recorders]):
        engine.backward(engine(torch.randn(5, 8)).square().sum())
    assert shapes == [
        ("first", "forward", (6, 8)), ("second", "forward", (4, 6)),
        ("second", "backward", (4, 6)), ("first", "backward", (6, 8))]  # fmt: skip
    assert model.first.weight.numel() == 0  # partitioned again
    assert {name: tuple(grad.shape) for name, grad in seen.parameters.items()} == {
        "first.weight": (6, 8), "first.bias": (6,), "second.weight": (4, 6)}  # fmt: skip
    for recorder in recorders:
        assert recorder.result(1).rows
