"""Train a vision transformer as an image classifier with Hugging Face's Trainer.

    image_classification.py --output_dir FOLDER --do_train [...]

The images are made here: stripes of one of four directions, in noise.
"""

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

SIZE = 16
DIRECTIONS = [(1, 0), (0, 1), (1, 1), (1, -1)]


class Stripes(Dataset):
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        down, right = DIRECTIONS[index % 4]
        stripes = torch.sin(0.8 * (down * rows + right * columns) + 6 * torch.rand(1, generator=generator))
        return {"pixel_values": stripes + 0.3 * torch.randn(3, SIZE, SIZE, generator=generator), "labels": index % 4}


def main():
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=4,
    )
    trainer = Trainer(model=ViTForImageClassification(config), args=arguments, train_dataset=Stripes(512))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
