"""Adam's moments in few bits beside exact ones, over whole trajectories: what
docs/results/2026-11-22-moment-trajectories.md reports.

    python tests/convergence/moment_trajectories.py            all schemes, and the optimizers that are installed
    python tests/convergence/moment_trajectories.py --quick    the recommended ones, in two minutes
    python tests/convergence/moment_trajectories.py --formats  number formats beside the maps of the same bits

Gradients:
    stationary   normal, with log-normal row and column scales (a factor e up and down), mean 0.3 deviations
    fall         the same, until at 3/(1-beta2) steps the gradients of every other element fall to a tenth; 5/(1-beta2)
                 further steps
    training     of a 2-layer Llama on the Python standard library's source, recorded under exact AdamW; the figures of
                 beta2 0.999 are those of the warm-up that its steps amount to

Columns, at the end of the trajectory:
    mean, median   of v_q / v (fall: of the elements that fell). Of elements whose v is above 1e-6 of its block of 256's
                   largest: rows of an embedding that are never hit again decay without end
    stuck          share of them with v_q > 2 v
    update         relative L2 error of m / (sqrt(v) + eps), mean of the last steps; cosine; norm over the exact norm
    path           relative L2 error of the sum of the last 50 updates: noise averages out in it, what is stuck does not
"""

import argparse
import math
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.numerics import CodeMap, code_map, dequantize_blockwise, fold_key, quantize_blockwise
from ds_quant.numerics.format import fake_quantize_to, named_format

BETA1, EPS = 0.9, 1e-8
LAST = 50
NUM_ROWS, NUM_COLUMNS = 32, 128


class Moment(NamedTuple):
    """How one moment is stored."""

    code_map: CodeMap
    block_size: int
    rounding: str = "nearest"

    def stored(self, x: Tensor, step: int, stream: int) -> Tensor:
        key = fold_key(1, step=step, stream=stream) if self.rounding == "stochastic" else None
        q = quantize_blockwise(x, self.code_map, block_size=self.block_size, rounding=self.rounding, key=key)
        return dequantize_blockwise(q)


class NamedMoment(NamedTuple):
    """How one moment would be stored in a number format, rounded stochastically. Squares leave the sign unused."""

    name: str
    block_size: int = 0
    """Where the format has none of its own; scales are fp32 then."""
    scale_rule: str = "floor"

    def stored(self, x: Tensor, step: int, stream: int) -> Tensor:
        fmt = named_format(self.name, "block", self.block_size, scale_rule=self.scale_rule)
        return fake_quantize_to(x, fmt, rounding="stochastic", key=fold_key(1, step=step, stream=stream))


Stored = Moment | NamedMoment


def power(bits: int, signed: bool, exponent: int | None = None, offset: int | None = None) -> CodeMap:
    default = code_map("power", bits, signed=signed)
    if offset is not None:
        default = default._replace(offset=offset, levels=offset + 15)
    return default if exponent is None else default._replace(exponent=exponent)


M8 = Moment(code_map("float", 8, signed=True), 256, "stochastic")
V8 = Moment(code_map("float", 8, signed=False), 256, "stochastic")
M4 = Moment(code_map("power", 4, signed=True), 128, "stochastic")
V4 = Moment(code_map("power", 4, signed=False), 128, "stochastic")

RECOMMENDED = {
    "8 bits": (M8, V8),
    "m 4 bits, v 8 bits": (M4, V8),
    "4 bits": (M4, V4),
}

POWER = (
    Moment(code_map("power", 8, signed=True), 256, "stochastic"),
    Moment(code_map("power", 8, signed=False), 256, "stochastic"),
)


def variants() -> dict[str, tuple[Moment | None, Moment | None]]:
    """Everything that was tried, one moment at a time; the other one stays exact."""
    schemes: dict[str, tuple[Moment | None, Moment | None]] = {**RECOMMENDED, "8 bits, power": POWER}
    for rounding in ("nearest", "stochastic"):
        for exponent in (2, 4, 8):
            schemes[f"v8 power {exponent}, {rounding}"] = (None, Moment(power(8, False, exponent), 256, rounding))
        for name in ("float", "linear", "dynamic"):
            schemes[f"v8 {name}, {rounding}"] = (None, Moment(code_map(name, 8, signed=False), 256, rounding))
    for rounding in ("nearest", "stochastic"):
        for exponent in (2, 4):
            schemes[f"m8 power {exponent}, {rounding}"] = (Moment(power(8, True, exponent), 256, rounding), None)
        for name in ("float", "linear", "dynamic"):
            schemes[f"m8 {name}, {rounding}"] = (Moment(code_map(name, 8, signed=True), 256, rounding), None)
    for rounding in ("nearest", "stochastic"):
        for exponent, offset in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 3), (8, 4), (8, 6)):
            moment = Moment(power(4, False, exponent, offset), 128, rounding)
            schemes[f"v4 ((c+{offset})/{15 + offset})^{exponent}, {rounding}"] = (None, moment)
    for block_size in (64, 32):
        schemes[f"v4 ((c+3)/18)^8, blocks of {block_size}, stochastic"] = (None, V4._replace(block_size=block_size))
    for name in ("power", "linear", "dynamic"):
        for rounding in ("nearest", "stochastic"):
            schemes[f"m4 {name}, {rounding}"] = (Moment(code_map(name, 4, signed=True), 128, rounding), None)
    for exponent, block_size in ((4, 128), (2, 64), (2, 32)):
        schemes[f"m4 power {exponent}, blocks of {block_size}"] = (Moment(power(4, True, exponent), block_size), None)
    return schemes


def number_formats() -> dict[str, tuple[Stored | None, Stored | None]]:
    """Formats and the maps of the same bits, one moment at a time; bits count scales."""
    eight = [NamedMoment(name, 256) for name in ("fp8_e4m3", "fp8_e5m2")]
    eight += [NamedMoment(name, 0, "up") for name in ("mxfp8", "mxint8")]
    four = [NamedMoment("fp4_e2m1", 128), NamedMoment("mxfp4", 0, "up")]
    four += [NamedMoment("nvfp4"), NamedMoment("nvfp4", 0, "four_six"), NamedMoment("nvint4")]
    schemes: dict[str, tuple[Stored | None, Stored | None]] = {}
    for letter, maps in (("m", ((M8, 128), (M4, 64))), ("v", ((V8, 128), (V4, 64)))):
        for (moment, smaller), formats in zip(maps, (eight, four), strict=True):
            name, bits = moment.code_map.name, moment.code_map.bits
            tried: list[Stored] = [moment, moment._replace(block_size=smaller), *formats]
            for one in tried:
                if isinstance(one, Moment):
                    what = f"{letter}{bits} {name}, blocks of {one.block_size}: {bits + 32 / one.block_size:.4g} bits"
                else:
                    scales = 32 / one.block_size if one.block_size else 8 / named_format(one.name).group.block_size
                    rule = f" ({one.scale_rule})" if one.scale_rule != "floor" else ""
                    what = f"{letter}{bits} {one.name}{rule}: {bits + scales:.4g} bits"
                schemes[what] = (one, None) if letter == "m" else (None, one)
    return schemes


class Trajectory(NamedTuple):
    gradients: Callable[[], Iterator[Tensor]]
    counted: Tensor
    """Which elements' v_q / v is reported."""


class Figures(NamedTuple):
    mean: float
    median: float
    stuck: float
    update: float
    cosine: float
    norm: float
    path: float


def synthetic(beta2: float, *, factor: float = 1.0, num_rows: int = NUM_ROWS, seed: int = 0) -> Trajectory:
    """Gradients that are multiplied by `factor`, in every other element, from 3/(1-beta2) steps on."""
    fall = factor != 1.0
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(shape, generator=generator) for shape in ((num_rows, 1), (1, NUM_COLUMNS)))
    deviation = 1e-3 * (rows + columns).exp().reshape(-1)
    mean = 0.3 * deviation * torch.randn(deviation.shape, generator=generator)
    chosen = torch.arange(deviation.numel()) % 2 == 0
    before = round(3 / (1 - beta2)) if fall else 0

    def gradients() -> Iterator[Tensor]:
        draws = torch.Generator().manual_seed(seed + 1)
        for step in range(before + round(5 / (1 - beta2))):
            gradient = mean + deviation * torch.randn(deviation.shape, generator=draws)
            yield torch.where(chosen & (step >= before), factor, 1.0) * gradient if fall else gradient

    return Trajectory(gradients, chosen if fall else torch.ones_like(chosen))


def recorded(num_steps: int, seed: int = 0) -> Trajectory:
    """Gradients of the first 2048 elements of six parameters of a tiny Llama that trains on bytes."""
    import transformers

    texts = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    data = torch.frombuffer(bytearray(b"".join(texts)[:2_000_000]), dtype=torch.uint8).long()
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        chosen = [
            model.model.embed_tokens.weight,
            model.model.layers[0].self_attn.q_proj.weight,
            model.model.layers[1].self_attn.v_proj.weight,
            model.model.layers[0].mlp.down_proj.weight,
            model.model.layers[1].mlp.gate_proj.weight,
            model.lm_head.weight,
        ]
        history = []
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50)
            starts = torch.randint(len(data) - 64, (16, 1))
            tokens = data[starts + torch.arange(64)]
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            history.append(torch.cat([parameter.grad.reshape(-1)[:2048] for parameter in chosen]))
            optimizer.step()
    return Trajectory(lambda: iter(history), torch.ones_like(history[0], dtype=torch.bool))


class Tracked:
    """One scheme on its way along a trajectory: `step` gives (m, v) before they are stored."""

    def __init__(self, numel: int, exp_avg: Stored | None, exp_avg_sq: Stored | None):
        self.m, self.v = torch.zeros(numel), torch.zeros(numel)
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        self.count = 0

    def step(self, gradient: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
        self.count += 1
        m = BETA1 * self.m + (1 - BETA1) * gradient
        v = beta2 * self.v + (1 - beta2) * gradient * gradient
        self.m = self.exp_avg.stored(m, self.count, 0) if self.exp_avg else m
        self.v = self.exp_avg_sq.stored(v, self.count, 1) if self.exp_avg_sq else v
        return m, v


class Peer:
    """A real optimizer: its moments are read back from its state, its update from what the step did."""

    def __init__(self, numel: int, make: Callable, read_v: Callable[[dict], Tensor], beta2: float):
        self.parameter = torch.nn.Parameter(torch.zeros(numel))
        self.optimizer = make([self.parameter], lr=1.0, betas=(BETA1, beta2), eps=EPS, weight_decay=0.0)
        self.read_v = read_v

    def update(self, gradient: Tensor) -> Tensor:
        self.parameter.data.zero_()
        self.parameter.grad = gradient.clone()
        self.optimizer.step()
        return -self.parameter.detach().clone()

    @property
    def v(self) -> Tensor:
        return self.read_v(self.optimizer.state[self.parameter])


def peers(numel: int, beta2: float) -> dict[str, Peer]:
    """bitsandbytes and torchao, where they are installed."""
    found = {}
    try:
        import bitsandbytes

        def read(state: dict) -> Tensor:
            return bitsandbytes.functional.dequantize_blockwise(
                state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
            )

        found["bitsandbytes AdamW8bit"] = Peer(numel, bitsandbytes.optim.AdamW8bit, read, beta2)
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW4bit, AdamW8bit

        for optimizer in (AdamW8bit, AdamW4bit):
            name = f"torchao {optimizer.__name__}"
            found[name] = Peer(numel, optimizer, lambda state: state["exp_avg_sq"].dequantize(), beta2)
    except ImportError:
        pass
    return found


def follow(
    trajectory: Trajectory,
    beta2: float,
    schemes: Mapping[str, tuple[Stored | None, Stored | None]],
    *,
    with_peers: bool = False,
) -> dict[str, Figures]:
    """Figures of every scheme along one trajectory."""
    numel = trajectory.counted.numel()
    exact = Tracked(numel, None, None)
    others = {name: Tracked(numel, *moments) for name, moments in schemes.items()}
    real = peers(numel, beta2) if with_peers else {}
    updates: dict[str, list[Tensor]] = {name: [] for name in ("exact", *others, *real)}

    for count, gradient in enumerate(trajectory.gradients(), start=1):
        corrections = (1 - BETA1**count), math.sqrt(1 - beta2**count)
        for name, tracked in (("exact", exact), *others.items()):
            m, v = tracked.step(gradient, beta2)
            updates[name] = [*updates[name][1 - LAST :], (m / corrections[0]) / (v.sqrt() / corrections[1] + EPS)]
        for name, peer in real.items():
            updates[name] = [*updates[name][1 - LAST :], peer.update(gradient)]

    blocks = torch.nn.functional.pad(exact.v, (0, -numel % 256)).reshape(-1, 256)
    alive = exact.v > 1e-6 * blocks.amax(dim=1).repeat_interleave(256)[:numel]
    counted = trajectory.counted & alive
    expected = torch.stack(updates["exact"])
    figures = {}
    for name, source in (*others.items(), *real.items()):
        ratio = (source.v / exact.v)[counted]
        got = torch.stack(updates[name])
        norms, expected_norms = got.norm(dim=1), expected.norm(dim=1)
        figures[name] = Figures(
            ratio.mean().item(),
            ratio.median().item(),
            (ratio > 2).float().mean().item(),
            ((got - expected).norm(dim=1) / expected_norms).mean().item(),
            ((got * expected).sum(dim=1) / norms / expected_norms).mean().item(),
            (norms / expected_norms).mean().item(),
            ((got - expected).sum(dim=0).norm() / expected.sum(dim=0).norm()).item(),
        )
    return figures


def table(figures: dict[str, Figures]) -> str:
    lines = [
        "| scheme | mean v_q/v | median | stuck | update error | cosine | norm | path error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in figures.items():
        lines.append(
            f"| {name} | {f.mean:.2f} | {f.median:.2f} | {f.stuck:.1%} | {f.update:.3f} | {f.cosine:.3f} "
            f"| {f.norm:.2f} | {f.path:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the recommended schemes only, no other optimizers")
    parser.add_argument("--formats", action="store_true", help="number formats beside the maps of the same bits")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help=f"rows of {NUM_COLUMNS} synthetic elements")
    parser.add_argument("--steps", type=int, default=600, help="of the recorded training run")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    versions = []
    for package in ("torch", "bitsandbytes", "torchao", "transformers"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    print(", ".join([*versions, f"Python {platform.python_version()}"]))
    schemes: Mapping[str, tuple[Stored | None, Stored | None]] = variants()
    if arguments.quick or arguments.formats:
        schemes = number_formats() if arguments.formats else RECOMMENDED
    training, schemes_are_all = recorded(arguments.steps), not (arguments.quick or arguments.formats)
    for beta2 in (0.95, 0.999):
        trajectories = {
            "stationary": synthetic(beta2, num_rows=arguments.rows),
            "fall": synthetic(beta2, factor=0.1, num_rows=arguments.rows),
            "training": training,
        }
        for name, trajectory in trajectories.items():
            figures = follow(trajectory, beta2, schemes, with_peers=schemes_are_all)
            print(f"\n### {name}, beta2 {beta2}\n\n{table(figures)}", flush=True)


if __name__ == "__main__":
    main()
