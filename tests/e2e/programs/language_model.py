"""A program for Trainer: a causal language model from a text file, with DeepSpeed where `--deepspeed` names a config.

Nothing in it knows of Partita. The calls are those of the well-known example of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class Given:
    """What is trained, on what."""

    model_name_or_path: str = field(metadata={"help": "a folder with a model and its tokenizer"})
    train_file: str = field(metadata={"help": "a text file"})
    validation_file: str = field(metadata={"help": "a text file"})
    block_size: int = field(default=16, metadata={"help": "tokens per sample"})


def main() -> None:
    given, arguments = HfArgumentParser((Given, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    files = {"train": given.train_file, "validation": given.validation_file}
    texts = load_dataset("text", data_files=files, cache_dir=f"{arguments.output_dir}/cache")
    config = AutoConfig.from_pretrained(given.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(given.model_name_or_path, config=config)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def blocks_of(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {key: list(chain(*values)) for key, values in tokenizer(examples["text"]).items()}
        length = len(joined["input_ids"]) // given.block_size * given.block_size
        starts = range(0, length, given.block_size)
        blocks = {key: [values[i : i + given.block_size] for i in starts] for key, values in joined.items()}
        return {**blocks, "labels": blocks["input_ids"].copy()}

    with arguments.main_process_first(desc="blocks of text"):
        samples = texts.map(blocks_of, batched=True, remove_columns=["text"])

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=samples["train"],
        eval_dataset=samples["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        compute_metrics=accuracy,
    )
    result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.save_metrics("eval", metrics)
    trainer.save_state()


def accuracy(predicted: Any) -> dict[str, float]:
    labels, answers = predicted.label_ids[:, 1:], predicted.predictions[:, :-1]
    return {"accuracy": float((labels == answers).mean())}


if __name__ == "__main__":
    main()
