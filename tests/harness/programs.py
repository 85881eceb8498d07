"""Programs written for DeepSpeed and Hugging Face, run as users do: by torchrun and `partita run`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

from warm_python import WarmPython

PROGRAMS = Path(__file__).parents[1] / "e2e" / "programs"
TEXT = "a of the and to in is it that was for on with as his her they at be this from had not but by what all were"
WORDS = TEXT.split()
VOCABULARY = ["<pad>", "<unk>", "<s>", "</s>", ":", "user", "assistant", *WORDS]
CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"


class Programs:
    """Runs programs of `PROGRAMS` in a folder, `ranks` processes each, with Partita as `deepspeed` or without any."""

    def __init__(self, python: WarmPython, folder: Path) -> None:
        self._python = python
        self.folder = folder

    def run(self, program: str, *arguments: Any, ranks: int = 2, partita: bool = True) -> str:
        """What the program wrote to its standard output. Fails, with all that it wrote, when the program fails."""
        launch = self._python.torchrun("--standalone", "--nproc-per-node", str(ranks))
        through = ["-m", "partita", "run"] if partita else []
        command = [*launch, *through, str(PROGRAMS / program), *map(str, arguments)]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            cwd=self.folder,
            env=os.environ | quiet | {"HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout


def logged(out: Path) -> dict[str, list[float]]:
    """What Trainer logged in the run that wrote to `out`, by name, in order."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {
        name: [line[name] for line in history if name in line] for name in sorted({n for line in history for n in line})
    }


def sentence(generator: random.Random, longest: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(longest // 3, longest)))


def save_tokenizer(folder: Path) -> int:
    """A tokenizer with a token for each of `VOCABULARY`; their number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **marks)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return len(VOCABULARY)


def save_gpt2(folder: Path) -> None:
    """A tiny GPT-2 without dropout, and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    numbers = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"vocab_size": save_tokenizer(folder), "n_embd": 20, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**size, **numbers, **still)).save_pretrained(folder)


def save_distilbert(folder: Path) -> None:
    """A tiny DistilBERT without dropout, with a classifier of two classes, and its tokenizer."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    still = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    size = {"vocab_size": save_tokenizer(folder), "dim": 20, "n_layers": 2, "n_heads": 2, "hidden_dim": 36}
    config = DistilBertConfig(**size, **still, max_position_embeddings=32, pad_token_id=0)
    DistilBertForSequenceClassification(config).save_pretrained(folder)


def save_config(path: Path, stage: int, **more: Any) -> Path:
    """A config as Hugging Face's guides give it: "auto" wherever Trainer knows better."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        zero |= dict.fromkeys(("stage3_prefetch_bucket_size", "reduce_bucket_size"), "auto")
        zero |= {"stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True}
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    sixteen = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    config = {**dict.fromkeys(automatic, "auto"), **sixteen, "zero_optimization": zero, "steps_per_print": 2000, **more}
    path.write_text(json.dumps(config))
    return path


OPTIMIZER_AND_SCHEDULE = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}
