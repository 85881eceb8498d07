"""A program for Trainer: a classifier of pairs of sentences in csv files, with its predictions of a third file.

Nothing in it knows of Partita. The calls are those of the well-known example of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Given:
    """What is trained, on what."""

    model_name_or_path: str
    train_file: str
    validation_file: str
    test_file: str


def main() -> None:
    given, arguments = HfArgumentParser((Given, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    files = {"train": given.train_file, "validation": given.validation_file, "test": given.test_file}
    pairs = load_dataset("csv", data_files=files, cache_dir=f"{arguments.output_dir}/cache")
    labels = sorted(pairs["train"].unique("label"))
    config = AutoConfig.from_pretrained(given.model_name_or_path, num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(given.model_name_or_path, config=config)
    model.config.label2id = {str(label): i for i, label in enumerate(labels)}

    def encode(examples: dict[str, list[Any]]) -> Any:
        return tokenizer(examples["first"], examples["second"], truncation=True)

    with arguments.main_process_first(desc="tokens"):
        pairs = pairs.map(encode, batched=True)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=pairs["train"],
        eval_dataset=pairs["validation"],
        compute_metrics=accuracy,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
    )
    result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", trainer.evaluate(eval_dataset=pairs["validation"]))
    answers = trainer.predict(pairs["test"].remove_columns("label"), metric_key_prefix="predict").predictions
    if trainer.is_world_process_zero():
        text = "".join(f"{labels[answer]}\n" for answer in np.argmax(answers, axis=1))
        (Path(arguments.output_dir) / "predictions.txt").write_text(text)
    trainer.save_state()


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(predicted.predictions, axis=1) == predicted.label_ids).mean())}


if __name__ == "__main__":
    main()
