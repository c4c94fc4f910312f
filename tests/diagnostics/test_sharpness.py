"""Sharpness and landscape of a quadratic, in closed form; weights come back bit for bit."""

import math

import pytest
import torch
from small_models import batch, converted, gpt2, llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_quant.base.errors import ConfigError
from ds_quant.diagnostics.landscape import landscape
from ds_quant.diagnostics.perturbation import filter_normalized_direction
from ds_quant.diagnostics.sharpness import sharpness


class Quadratic(nn.Module):
    """loss = scale * (w^T H w / 2 + b^T w), over two parameters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.hessian = root @ root.t()
        self.slope = torch.randn(6, generator=generator, dtype=torch.float64)
        self.one = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, scale):
        w = torch.cat([self.one.reshape(-1), self.two])
        return scale * (w @ self.hessian @ w / 2 + self.slope @ w)

    def closed_form(self, step):
        """loss(w + step) - loss(w)."""
        w = torch.cat([self.one.reshape(-1), self.two]).detach()
        return float(step @ (self.hessian @ w + self.slope) + step @ self.hessian @ step / 2)

    def gradient(self):
        w = torch.cat([self.one.reshape(-1), self.two]).detach()
        return self.hessian @ w + self.slope


def loss_of(model, scale):
    return model(scale)


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sharpness_of_a_quadratic(rho):
    model = Quadratic()
    found = sharpness(model, [1.0, 3.0], loss_of, rho=rho, step=9)
    gradient = model.gradient()
    rise = model.closed_form(rho * gradient / gradient.norm())
    assert [row["sharpness"] for row in found.rows] == pytest.approx([rise, 3 * rise])
    assert found.scalars["sharpness"] == pytest.approx(2 * rise)
    # Two values x and 3x: deviation sqrt(2) x, standard error x.
    assert found.scalars["standard_error"] == pytest.approx(rise)
    assert [row["gradient_norm"] for row in found.rows] == pytest.approx(
        [float(gradient.norm()), 3 * float(gradient.norm())]
    )
    assert found.settings == {"rho": rho, "batches": 2}
    assert found.step == 9


def test_at_the_minimum_there_is_no_direction_and_no_rise():
    model = Quadratic()
    model.hessian, model.slope = torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert sharpness(model, [1.0], loss_of).scalars == {"sharpness": 0.0, "loss": 0.0}


def flat(direction):
    return torch.cat([part.reshape(-1) for part in direction[:2]])


def test_landscape_of_a_quadratic_along_known_directions():
    model = Quadratic()
    d = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.tensor([0.5, 0.0]).double(), torch.zeros(3).double()]
    e = [torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double(), torch.tensor([0.0, 1.0]).double(), torch.zeros(3).double()]
    center = float(model(1.0).detach())
    line = landscape(model, [1.0, 3.0], loss_of, directions=[d], points=5, span=0.4)
    for row in line.rows:
        assert row["loss"] == pytest.approx(2 * (center + model.closed_form(row["x"] * flat(d))))
    assert [row["x"] for row in line.rows] == pytest.approx([-0.4, -0.2, 0.0, 0.2, 0.4])
    assert line.scalars["loss"] == pytest.approx(2 * center)
    assert line.scalars["curvature_1"] == pytest.approx(2 * float(flat(d) @ model.hessian @ flat(d)))
    plane = landscape(model, [1.0], loss_of, directions=[d, e], dimensions=2, points=3, span=0.5)
    assert len(plane.rows) == 9
    for row in plane.rows:
        assert row["loss"] == pytest.approx(center + model.closed_form(row["x"] * flat(d) + row["y"] * flat(e)))
    assert plane.scalars["curvature_2"] == pytest.approx(float(flat(e) @ model.hessian @ flat(e)))
    assert plane.scalars["highest"] == max(row["loss"] for row in plane.rows)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("linear", [None, {"weight": {"bits": 4}, "backend": "simulated"}, {"weight": {"bits": 8},
    "activation": {"bits": 8}, "backend": "int8"}])  # fmt: skip
def test_weights_modes_and_gradients_are_as_before(make, linear):
    model = make(tie_word_embeddings=True)
    if linear:
        converted(model, linear)
    model.train()
    model.lm_head.eval()
    model(**batch()).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    first = sharpness(model, [batch()])
    lines = [landscape(model, [batch()], points=3, span=0.1, dimensions=2) for _ in range(2)]
    assert first.scalars["sharpness"] > 0
    assert sharpness(model, [batch()]) == first
    assert lines[0] == lines[1]
    assert lines[0].scalars["loss"] == pytest.approx(first.scalars["loss"], rel=1e-6)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32))
        assert torch.equal(parameter.grad, grads[name])


def test_weights_come_back_when_an_evaluation_fails():
    model = Quadratic()
    before = [p.detach().clone() for p in model.parameters()]

    def failing(model, scale):
        if not torch.equal(model.one, before[0]):
            raise RuntimeError("no more")
        return model(scale)

    for call in (sharpness, landscape):
        with pytest.raises(RuntimeError, match="no more"):
            call(model, [1.0], failing)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_directions_are_as_long_as_each_filter_and_repeat_themselves():
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(5, 3), "conv": Conv1D(4, 6), "norm": nn.LayerNorm(3)})
    with torch.no_grad():
        model["linear"].weight[1] = 0.0
    names = [name for name, _ in model.named_parameters()]
    found = dict(zip(names, filter_normalized_direction(model, 7), strict=True))
    torch.testing.assert_close(found["linear.weight"].norm(dim=1), model["linear"].weight.norm(dim=1))
    torch.testing.assert_close(found["conv.weight"].norm(dim=0), model["conv"].weight.norm(dim=0))
    for name in ("linear.bias", "conv.bias", "norm.weight", "norm.bias"):
        assert not found[name].any()
    again = dict(zip(names, filter_normalized_direction(model, 7), strict=True))
    assert all(torch.equal(found[name], again[name]) for name in names)
    other = dict(zip(names, filter_normalized_direction(model, 8), strict=True))
    assert not torch.equal(found["conv.weight"], other["conv.weight"])
    model["extra"] = nn.Linear(2, 2)  # what is beside it does not change a parameter's direction
    assert torch.equal(filter_normalized_direction(model, 7)[0], found["linear.weight"])


@pytest.mark.parametrize("changes", [{"rho": 0.0}, {"rho": math.nan}])
def test_a_step_of_no_length_is_refused(changes):
    with pytest.raises(ConfigError, match=r"0\.05"):
        sharpness(Quadratic(), [1.0], loss_of, **changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"dimensions": 3}, "dimensions"), ({"points": 4}, "odd"), ({"points": 1}, "odd"), ({"span": -1.0}, "span")],
)
def test_a_landscape_that_makes_no_sense_is_refused(changes, word):
    with pytest.raises(ConfigError, match=word):
        landscape(Quadratic(), [1.0], loss_of, **changes)


def test_what_cannot_be_moved_or_measured_is_refused():
    for call in (sharpness, landscape):
        with pytest.raises(ConfigError, match="no batches"):
            call(Quadratic(), [], loss_of)
        with pytest.raises(ConfigError, match="float32"):
            call(llama().bfloat16(), [batch()])
        frozen = Quadratic().requires_grad_(False)
        with pytest.raises(ConfigError, match="trainable"):
            call(frozen, [1.0], loss_of)
        partitioned = Quadratic()
        partitioned.one.ds_shape = (2, 2)
        with pytest.raises(ConfigError, match="ZeRO-3"):
            call(partitioned, [1.0], loss_of)
    with pytest.raises(ConfigError, match="diverged"):
        sharpness(Quadratic(), [math.inf], loss_of)
