"""What all tokens have in common, taken off operands before they are quantized: Averis (arXiv 2603.10444).

With m the mean of the tokens of X and n that of G, both over the T tokens of a call, X = Xc + 1 m^T and G = Gc + 1 n^T:

    Y  = Q(Xc) Q(W)^T + 1 (Q(W) m)^T
    dX = Q(Gc) Q(W)   + 1 (Q(W)^T n)^T
    dW = Q(Gc)^T Q(Xc) + T n m^T

as the columns of Xc and Gc add up to 0. Without a split of G, dW = Q(G)^T Q(Xc) + (sum of G) m^T. Means and the terms
with them are fp32; m and n are not quantized.
"""

import torch
from torch import Tensor

from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.products import Operand
from ds_quant.linear.recipe import Quantizer
from ds_quant.linear.rotated import Rotation


def split(x: Tensor, quantizer: Quantizer | None) -> tuple[Tensor, Tensor | None]:
    """x [tokens, features] without its mean, fp32, and the mean [features]; x itself and None where it is not split."""
    if quantizer is None or not quantizer.split_mean:
        return x, None
    mean = kernels.token_mean(x.detach())
    return x.detach().float() - mean, mean


def as_bias(mean: Tensor | None, other: Operand, bias: Tensor | None, rotation: Rotation | None) -> Tensor | None:
    """What a product with the mean [contracted] adds to each of its rows, fp32 [free]; and `bias`, where there is one.

    rotation: of `other` [free, contracted], None where it is not rotated.
    """
    if mean is None:
        return bias
    turned = rotation.of_rows(mean[None])[0] if rotation else mean
    term = torch.mv(other.dense(torch.float32), turned)
    return term if bias is None else term + bias.detach().float()


def outer(g: Tensor, mean: Tensor, transposed: bool) -> Tensor:
    """(sum of G) m^T, fp32, in the layout of the weight: T n is the sum of G."""
    sums = g.detach().float().sum(0)
    return torch.outer(mean, sums) if transposed else torch.outer(sums, mean)
