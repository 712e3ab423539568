"""A byte-level BPE tokenizer with our chat template, trained on the rows a base is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loramux.adapters.training.chat import CHAT_TEMPLATE
from loramux.adapters.training.rows import Row, user_text

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, "<|system|>", "<|user|>", "<|assistant|>", END, PAD)


def train_tokenizer(
    groups: Sequence[Sequence[Row]], *, vocabulary: int, context: int, seed_rows: int = 4000
) -> PreTrainedTokenizerFast:
    """Train on at most `seed_rows` rows of each group, so that a large group does not fill the vocabulary.

    Digits are split one by one; any byte sequence can be encoded and comes back unchanged.

    Args:
        groups: rows by source.
        vocabulary: size of the vocabulary, special tokens included.
        context: longest input in tokens the tokenizer declares.
        seed_rows: rows taken from each group.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for rows in groups for row in rows[:seed_rows] for text in (user_text(row), row.output))
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (BOS, END, PAD)],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
