"""Conversations, a tokenizer of any chat template's characters, and the templates that TRL knows."""

import importlib.util
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = re.compile(r"<\|[^|>]*\|>|</?[a-z_]+>|<｜[^｜]*｜>|\[/?[A-Z_]+\]")


def tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of the special tokens that a template names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(sorted({"<|endoftext|>", "<s>", *SPECIAL.findall(template)}))
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, eos_token="<|endoftext|>", bos_token="<s>", chat_template=template
    )


def of_trl(name: str) -> str:
    """A chat template that TRL brings."""
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(folder) / "chat_templates" / f"{name}.jinja").read_text()


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


# Conversations of very different lengths, one longer than 192 tokens.
CHATS = [
    chat(*(f"{'ab ' * (3 * turn % 11)}{number}.{turn}" for turn in range(2 + 2 * (number % 3)))) for number in range(18)
] + [chat("Tell me a long story.", "x" * 300)]
