"""Train or evaluate a causal language model with Hugging Face's Trainer, after transformers' examples run_clm.py.

    causal_lm.py --model_name_or_path FOLDER --data_folder FOLDER --output_dir FOLDER --do_train --do_eval [...]

--lora trains adapters by PEFT in place of the weights.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str
    data_folder: str = field(metadata={"help": "with train.jsonl and test.jsonl, a text a line"})
    block_size: int = 32
    lora: bool = False


def main():
    options, arguments = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        model.print_trainable_parameters()

    def blocks(rows):
        ids = [token for text in rows["text"] for token in tokenizer(text)["input_ids"]]
        size = options.block_size
        return {"input_ids": [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]}

    with arguments.main_process_first():
        data = load_dataset(options.data_folder)
        data = data.map(blocks, batched=True, remove_columns=data["train"].column_names)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"] if arguments.do_train else None,
        eval_dataset=data["test"] if arguments.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    if arguments.do_train:
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if arguments.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
