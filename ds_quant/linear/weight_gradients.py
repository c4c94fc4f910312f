"""What the gradient of a weight gains or loses by where the weight lies between its codes.

With Q(w) the value that the forward has for w, rounded to nearest, and s the scale of w,

    trust       the gradient is 0 where |w - Q(w)| > distance * s
    dampening   the gradient gains 2 lambda (w - Q(w))

The first is the trust estimator of QuEST (arXiv 2502.05003), which passes on the gradient of a weight only where the
quantized value is near it. There the distance is half a step of a quantizer that clips, and masks what is clipped.
Scales by the largest magnitude clip nothing, so that only distances below a half mask anything: weights near a
threshold between two codes, which are those that oscillate.

The second is the gradient of lambda * sum (w - Q(w))^2, the loss of oscillation dampening (Nagel et al. 2022, arXiv
2203.11086) without its clipping, with Q(w) held constant: it pulls weights to the middle of their bins. It is added
once for each forward of the layer, times the share that a forward's loss has in a step, and is not masked. In the
paper lambda rises along a cosine; here it is constant.
"""

import torch
from torch import Tensor

from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.recipe import Plan
from ds_quant.numerics.integer import expand_scale, in_steps, integer_values


def adjusted(grad: Tensor, weight: Tensor, plan: Plan, loss_share: float) -> Tensor:
    """The gradient `grad` of `weight`, both as the weight is stored, in the weight's dtype."""
    quantizer = plan.weight
    if quantizer is None or not (quantizer.trust_distance or quantizer.dampening):
        return grad
    weight = weight.detach()
    w = weight.t() if plan.transposed else weight  # [out, in]
    q = kernels.quantize(w, None, quantizer.format, "nearest", None, 0)
    g, w = (grad.t() if plan.transposed else grad).float(), w.float()
    if quantizer.trust_distance:
        off = in_steps(w, expand_scale(q)) - integer_values(q)
        g = torch.where(off.abs() <= quantizer.trust_distance, g, 0.0)
    if quantizer.dampening:
        g = g + (2 * quantizer.dampening * loss_share) * (w - kernels.dequantize(q, torch.float32))
    return (g.t() if plan.transposed else g).to(weight.dtype)
