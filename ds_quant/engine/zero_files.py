"""What DeepSpeed's own files of a checkpoint hold, put together without an engine."""

import torch


def fp32_weights(folder: str) -> dict[str, torch.Tensor]:
    """The fp32 master weights by the model's names, each whole. Broken files raise what DeepSpeed raises."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(folder))
