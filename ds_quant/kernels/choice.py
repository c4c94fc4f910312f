"""DS_QUANT_KERNELS in the environment: which kernels to take instead of the fastest.

reference   the definitions of `ds_quant.numerics` for everything, slow
triton      on CUDA, Triton's kernels for the steps of AdamW whose format they take, and for the products of int8
            linear layers and what goes into them
compiled    on CUDA, torch.compile and torch's own products, and no kernels of Triton's that are written here

Other names are those of backends that `registry.add_backend` was told to take only by choice.
"""

from ds_quant.base.errors import fail

VARIABLE = "DS_QUANT_KERNELS"
REFERENCE = "reference"
CHOICES = [REFERENCE, "triton", "compiled"]


def check_choice(value: str) -> None:
    """Raises ConfigError for what DS_QUANT_KERNELS may not say."""
    if value and value not in CHOICES:
        raise fail(VARIABLE, value, " or ".join(CHOICES), "correct it, or unset it for the fastest kernels")
