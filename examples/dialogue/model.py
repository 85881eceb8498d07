"""A causal language model with its tokenizer: from a name, a folder, or a config and the dialogues; and as a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common.hub import hub_is_there
from common.job import JobError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from dialogue.dialogues import DEFAULT_TEMPLATE, TEMPLATE_TOKENS, Dialogue
from dialogue.generation import Ends, shared_out

PAD = "<|pad|>"
END = TEMPLATE_TOKENS[-1]
NOT_CAUSAL = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")  # how architectures end


def quiet() -> None:
    """No progress bars and advice of transformers: the job has its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make_model(source: str, dialogues: Sequence[Dialogue], vocabulary: int, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer) on the CPU, the same on all ranks.

    Args:
        source: a folder or a hub's name, which `from_pretrained` opens; or a JSON file with a config's `model_type` and
            sizes: a new model, with a tokenizer of `vocabulary` tokens made from the dialogues.

    Raises:
        JobError: there is no such thing; names it.
    """
    quiet()
    torch.manual_seed(seed)
    if source.endswith(".json"):
        (text,) = shared_out(1, 1, lambda _: [train_tokenizer(dialogues, vocabulary)])
        tokenizer = tokenizer_of(text)
        return _new_model(Path(source), tokenizer), tokenizer
    with _said_in_one_line(source) as options:
        tokenizer = with_template(AutoTokenizer.from_pretrained(source, **options))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    _require_causal(model, source)
    if not tokenizer.is_fast:
        raise JobError(f"--model {source}: its tokenizer has no tokenizer.json, so it cannot say where tokens begin")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def open_model(source: str) -> tuple[Any, Any]:
    """(model, tokenizer) to talk to.

    Raises:
        JobError: it is no model with a tokenizer that has a chat template; names it.
    """
    quiet()
    with _said_in_one_line(source) as options:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    _require_causal(model, source)
    if tokenizer.chat_template is None:
        raise JobError(
            f"{source} has no chat template: it was not trained on dialogues (examples/finetune_chat.py does)"
        )
    return model.eval(), tokenizer


def _require_causal(model: Any, source: str) -> None:
    """Refuses an encoder, which transformers opens: its tokens see those that follow, so there is nothing to learn."""
    names = model.config.architectures or []
    if names and all(name.endswith(NOT_CAUSAL) and not name.endswith("LMHeadModel") for name in names):
        raise JobError(f"{source} is a {', '.join(names)}, and no causal language model")


@contextlib.contextmanager
def _said_in_one_line(source: str) -> Iterator[dict[str, Any]]:
    """Errors of opening `source`, a folder or a hub's name; gives options for `from_pretrained`."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise JobError(f"{source} has no config.json: it is no folder of a model of transformers")
    if not path.is_dir() and (path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise JobError(f"there is no folder {source}: give one that transformers or finetune_chat.py has written")
    try:  # without a network what was downloaded before is used, and nothing is waited for
        yield {} if path.is_dir() or hub_is_there() else {"local_files_only": True}
    except Exception as error:  # of transformers, the hub, safetensors, JSON: whatever the folder or network has
        why = (str(error).strip() or repr(error)).splitlines()[0]
        what = (
            "holds no causal language model of transformers" if path.is_dir() else "is no model that the hub gives now"
        )
        raise JobError(f"{source} {what}: {why}") from None


def _new_model(file: Path, tokenizer: Any) -> Any:
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(
            **sizes,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(config)
    except OSError as error:
        raise JobError(f"cannot read the model's config {file}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise JobError(f"{file} is no config of a causal language model of transformers: {error}") from None


def train_tokenizer(dialogues: Sequence[Dialogue], vocabulary: int) -> str:
    """The JSON of a byte-level BPE tokenizer over the dialogues' contents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, *TEMPLATE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    contents = (message["content"] for dialogue in dialogues for message in dialogue.messages)
    bpe.train_from_iterator(contents, trainer)
    return str(bpe.to_str())


def tokenizer_of(text: str) -> Any:
    """What `train_tokenizer` has made, as transformers has it, with the default chat template."""
    bpe = Tokenizer.from_str(text)
    return with_template(
        PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False)
    )


def with_template(tokenizer: Any) -> Any:
    """The tokenizer; without a chat template it gets the default one, whose tokens are added where they are missing."""
    if tokenizer.chat_template is None:
        known = tokenizer.get_vocab()
        missing = [token for token in TEMPLATE_TOKENS if token not in known]
        tokenizer.add_special_tokens({"additional_special_tokens": missing}) if missing else None
        tokenizer.chat_template = DEFAULT_TEMPLATE
        tokenizer.eos_token = END
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ends_of(model: Any, tokenizer: Any) -> Ends:
    """What ends an answer: the tokenizer's end, and those that the model's own generation config names."""
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    also = of_model if isinstance(of_model, list) else [of_model]
    eos = dict.fromkeys(token for token in [tokenizer.eos_token_id, *also] if token is not None)
    return Ends(tuple(eos), tokenizer.pad_token_id)


def context_of(model: Any) -> int:
    """The most tokens that the model sees at once."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return int(longest) if longest else 1 << 30


def write_beside_weights(model: Any, tokenizer: Any, ends: Ends, folder: Path) -> None:
    """What makes a folder with model.safetensors one that `from_pretrained` opens; on one rank."""
    model.config.architectures = [type(model).__name__]  # by which evaluate.py sees what the folder holds
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=list(ends.eos), pad_token_id=ends.pad).save_pretrained(folder)
