"""Rows as chats: token ids of a one-turn conversation, and where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loramux.adapters.training.errors import ChatError
from loramux.adapters.training.rows import Row, user_text

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of one row, and the index of the first answer token among them."""

    ids: tuple[int, ...]
    answer_start: int

    def __len__(self) -> int:
        return len(self.ids)


def encode_rows(tokenizer: Any, rows: Sequence[Row], max_tokens: int) -> list[EncodedRow]:
    """Each row as one user turn and one answer, in the tokenizer's own chat template.

    The ids are the rendered user turn with the generation prompt, then the answer, then the end-of-sequence
    token. A row longer than `max_tokens` loses the end of its answer; one whose prompt alone fills
    `max_tokens` has `answer_start == len(ids)` and teaches nothing about answers.

    Args:
        tokenizer: any transformers tokenizer with a chat template and an end-of-sequence token.
        rows: the rows to encode.
        max_tokens: the longest encoding kept, in tokens.

    Raises:
        ChatError: the tokenizer has no chat template or no end-of-sequence token.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ChatError("the tokenizer has no chat template; add one to tokenizer_config.json")
    if tokenizer.eos_token_id is None:
        raise ChatError("the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if not rows:
        return []
    chats = [[{"role": "user", "content": user_text(row)}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([row.output for row in rows], add_special_tokens=False)["input_ids"]
    encoded = []
    for prompt, answer in zip(prompt_ids, answer_ids, strict=True):
        ids = (*prompt, *answer, tokenizer.eos_token_id)[:max_tokens]
        encoded.append(EncodedRow(ids=ids, answer_start=min(len(prompt), len(ids))))
    return encoded
