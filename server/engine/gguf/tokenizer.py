"""The tokenizer that a GGUF file describes, with its chat template.

A file lists tokens, their kinds, and merges or scores. How text is cut before the merges are applied it only
names (`tokenizer.ggml.pre`), so the rules behind the names that the served families use are listed here.
Another name is refused: a wrong rule gives other tokens than the model was trained on, and nothing
would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loramux.server.engine.gguf.container import GgufError, GgufFile

#: Tokens that end a turn, whatever else a file says.
_END_OF_TURN = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
        "<|end_of_text|>", "<EOT>", "<|EOT|>", "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip
_BLANK = "▁"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str) -> str:
    """Words cut where a lower-case letter is followed by an upper-case one."""
    head = r"[^\r\n\p{L}\p{N}]?"
    return rf"{head}{_UPPER}*{_LOWER}+{ending}|{head}{_UPPER}+{_LOWER}*{ending}"


_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Cut:
    """How a byte-level tokenizer cuts text into words.

    Attributes:
        pattern: a word; None is GPT-2's.
        digits: every digit is a word of its own.
        whole: a word that is a token is taken as it is, without merges.
        compose: characters are composed first (NFC).
        bos: every text begins with the first token, where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    compose: bool = False
    bos: bool = False


_GPT2 = Cut()
_DIGITS = Cut(digits=True)
_LLAMA3 = Cut(rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole=True, bos=True)
_CL100K = Cut(rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}")
_QWEN2 = Cut(rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}", compose=True)
_O200K = Cut(rf"{_cased(_ENDINGS + '?')}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}")
_TEKKEN = Cut(rf"{_cased('')}|\p{{N}}|{_REST_WITH_SLASH}", whole=True)
#: `tokenizer.ggml.pre` -> rule.
CUTS = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "gpt-4o": _O200K,
    "tekken": _TEKKEN,
}


class Vocabulary:
    """What a file says about its tokens."""

    def __init__(self, file: GgufFile) -> None:
        """
        Raises:
            GgufError: the file has no tokenizer, or lists that do not go together.
        """
        self.file = file
        self.model = self.get("model")
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise GgufError(f"{file.path}: it holds no tokenizer (tokenizer.ggml.tokens)")
        self.tokens: list[str] = tokens
        self.kinds: Sequence[int] = self.get("token_type") or [Kind.NORMAL] * len(tokens)
        for name in ("token_type", "scores"):
            if (given := self.get(name)) is not None and len(given) != len(tokens):
                raise GgufError(
                    f"{file.path}: tokenizer.ggml.{name} has {len(given)} entries for {len(tokens)} tokens"
                )

    def get(self, name: str, default: Any = None) -> Any:
        """`tokenizer.ggml.<name>`."""
        return self.file.metadata.get(f"tokenizer.ggml.{name}", default)

    def id_of(self, role: str, default: int | None = None) -> int | None:
        """The id of a token by its role, e.g. `bos`.

        Raises:
            GgufError: there is no such token.
        """
        number = self.get(f"{role}_token_id", default)
        if number is None or number == 2**32 - 1:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise GgufError(
                f"{self.file.path}: tokenizer.ggml.{role}_token_id is {number!r} of {len(self.tokens)}"
            )
        return number

    @property
    def end_ids(self) -> list[int]:
        """Every token that ends an answer; the one the file calls `eos` comes first."""
        stated = [self.id_of(role) for role in ("eos", "eot", "eom")]
        known = [
            number
            for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (Kind.CONTROL, Kind.USER_DEFINED) and token in _END_OF_TURN
        ]
        return list(dict.fromkeys(number for number in (*stated, *known) if number is not None))


def read_tokenizer(file: GgufFile, *, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a file, ready to be saved beside the model.

    Raises:
        GgufError: there is none, or it is of a kind that is not read.
    """
    vocabulary = Vocabulary(file)
    sentencepiece = vocabulary.model == "llama"
    if sentencepiece:
        backend, add_bos = _sentencepiece(vocabulary), True
    elif vocabulary.model == "gpt2":
        backend, add_bos = _byte_level(vocabulary)
    else:
        raise GgufError(
            f"{file.path}: a tokenizer of the kind {vocabulary.model!r} is not read; gpt2 and llama are"
        )
    _add_whole_tokens(backend, vocabulary, respelled=sentencepiece)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if sentencepiece else {}
    ids = {role: vocabulary.id_of(role, defaults.get(role)) for role in ("bos", "eos", "unknown", "padding")}
    names = {role: None if number is None else vocabulary.tokens[number] for role, number in ids.items()}
    backend.post_processor = _ends(
        (names["bos"], ids["bos"]) if vocabulary.get("add_bos_token", add_bos) else None,
        (names["eos"], ids["eos"]) if vocabulary.get("add_eos_token", False) else None,
    )
    template = file.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=names["bos"],
        eos_token=names["eos"],
        unk_token=names["unknown"],
        pad_token=names["padding"] or names["eos"],
        chat_template=template if isinstance(template, str) and template.strip() else None,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _ends(bos: tuple[str | None, int | None] | None, eos: tuple[str | None, int | None] | None) -> Any:
    """What every text begins and ends with."""
    given = [token for token in (bos, eos) if token is not None and token[0] is not None]
    if not given:
        return processors.ByteLevel(trim_offsets=False)
    head, tail = ([token[0]] if token in given and token is not None else [] for token in (bos, eos))
    return processors.TemplateProcessing(
        single=[*head, "$A", *tail], pair=[*head, "$A", *tail, *head, "$B", *tail], special_tokens=given
    )


def _byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether a text begins with `bos` where the file does not say."""
    path, name = vocabulary.file.path, vocabulary.get("pre")
    if name is None:
        # Files of early 2024 and before do not say.
        name = "qwen2" if vocabulary.file.architecture.startswith("qwen") else "default"
    if name not in CUTS:
        raise GgufError(f"{path}: tokenizer.ggml.pre {name!r} is not known; these are: {', '.join(CUTS)}")
    cut = CUTS[name]
    merges = vocabulary.get("merges")
    if merges is None:
        raise GgufError(f"{path}: it holds no tokenizer.ggml.merges, which a gpt2 tokenizer needs")
    vocab = {token: number for number, token in enumerate(vocabulary.tokens)}
    pairs = [_pair(merge) for merge in merges]
    for left, right in pairs:
        # The library ends the process over a merge that makes no token.
        if not {left, right, left + right} <= vocab.keys():
            raise GgufError(f"{path}: its tokenizer is damaged: the merge {left!r} {right!r} makes no token")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if cut.compose:
        backend.normalizer = normalizers.NFC()
    return backend, cut.bos


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """BPE of SentencePiece: blanks are written out, and what has no token is spelled in bytes."""
    scores = vocabulary.get("scores")
    if scores is None:
        raise GgufError(
            f"{vocabulary.file.path}: it holds no tokenizer.ggml.scores, which a llama tokenizer needs"
        )
    vocab: dict[str, int] = {}
    for number, token in enumerate(vocabulary.tokens):
        # A run of blanks is stored as it looks, and used as it is written.
        vocab.setdefault(_respelled(token), number)
    gemma = vocabulary.file.architecture.startswith("gemma")
    # Gemma's scores do not follow the order of its merges, its ids do.
    rank = {token: (number if gemma else -scores[number]) for token, number in vocab.items()}
    whole = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE)
    }
    merges = _implied_merges(vocab, rank, whole)
    unknown = _respelled(vocabulary.tokens[vocabulary.id_of("unknown", 0) or 0])
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(vocabulary.get("add_space_prefix", True))
    spelled = normalizers.Replace(" ", _BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), spelled]) if prefix else spelled
    undo: list[Any] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return backend


def _pair(merge: str) -> tuple[str, str]:
    """Both sides of a merge; a token never begins with a blank, but may be one."""
    left, _, right = merge.partition(" ")
    return left, right


def _respelled(token: str) -> str:
    return _BLANK * len(token) if token and not token.strip(" ") else token


def _implied_merges(vocab: dict[str, int], rank: dict[str, float], whole: set[str]) -> list[tuple[str, str]]:
    """The merges that a list of pieces stands for: every way to put a piece together, best piece first."""
    found = []
    for piece in vocab:
        if piece in whole:
            continue
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in vocab and right in vocab and left not in whole and right not in whole:
                found.append((rank[piece], vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_whole_tokens(backend: Tokenizer, vocabulary: Vocabulary, *, respelled: bool) -> None:
    """Tokens that are found in a text before anything else is."""
    strips = vocabulary.file.architecture == "phi3" and respelled
    added = []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        special = kind in (Kind.CONTROL, Kind.UNKNOWN)
        if not token or not (special or kind == Kind.USER_DEFINED):
            continue
        if respelled and not token.strip(" "):
            continue  # runs of blanks come out of the merges
        # Phi-3's own tokenizer swallows the blanks after all of its marks but these.
        strip = strips and special and token not in ("<unk>", "<s>", "<|endoftext|>")
        added.append(AddedToken(token, normalized=False, special=special, rstrip=strip))
    backend.add_tokens(added)
