"""Randomly initialised BERTs in the on-disk layouts of real E5 repositories."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from tests.unit.router.kit import TOPICS, module, write_json

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece() -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789:?!.,éñ中文"
    words = [*_SPECIAL, "query", *letters, *(f"##{letter}" for letter in letters)]
    words += sorted({word for topic in TOPICS.values() for word in topic})
    core = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )


def config(*, layers: int = 12, hidden: int = 384) -> BertConfig:
    """intfloat/e5-small-v2's shape (12 layers, 384 wide, 12 heads, 512 positions) but for the vocabulary."""
    return BertConfig(
        vocab_size=len(wordpiece()),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )


def write_plain(folder: Path) -> Path:
    """A bare Hugging Face model directory, without `modules.json`."""
    torch.manual_seed(3)
    BertModel(config(), add_pooling_layer=False).eval().save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    return folder


def write_e5(folder: Path) -> Path:
    """The files of an E5 repository: modules.json, sentence_bert_config.json, 1_Pooling, 2_Normalize."""
    write_plain(folder)
    legacy = "sentence_transformers.models"
    write_json(
        folder / "modules.json",
        [
            module(0, "", f"{legacy}.Transformer"),
            module(1, "1_Pooling", f"{legacy}.Pooling"),
            module(2, "2_Normalize", f"{legacy}.Normalize"),
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": 384,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    return folder


def write_classifier(folder: Path, labels: dict[int, str]) -> Path:
    """A small sequence classifier with random weights whose classes are `labels`."""
    torch.manual_seed(5)
    settings = config(layers=2, hidden=48)
    settings.id2label, settings.label2id = labels, {name: number for number, name in labels.items()}
    model = BertForSequenceClassification(settings)
    torch.nn.init.normal_(model.classifier.weight)
    model.eval().save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    return folder
