"""A program for TRL: training on dialogues (`sft`) or on preferred and other answers (`dpo`), with LoRA or not.

Nothing in it knows of Partita. The calls are those of TRL's own scripts.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config


def main() -> None:
    kind = sys.argv.pop(1)
    config_class, trainer_class = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[kind]
    given, arguments, of_model = TrlParser((ScriptArguments, config_class, ModelConfig)).parse_args_and_config()
    arguments.model_init_kwargs = {"dtype": of_model.dtype}
    cache = f"{arguments.output_dir}/cache"
    data = load_dataset("json", data_files={"train": given.dataset_name}, split="train", cache_dir=cache)
    data = data.train_test_split(test_size=6, shuffle=False)
    trainer = trainer_class(
        model=of_model.model_name_or_path,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=get_peft_config(of_model),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(arguments.output_dir)
    trainer.save_state()


if __name__ == "__main__":
    main()
