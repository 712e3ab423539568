"""Which container a tensor file is, told by its keys: configs of different authors call themselves alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from loramux.adapters.errors import AdapterFormatError, UnsupportedAdapterError


class Container(StrEnum):
    """The families of key names that are read."""

    MIXLORA = "MixLoRA"
    LORAMOE = "LoRAMoE as MoE-PEFT writes it"
    MOLA = "MoLA as MoE-PEFT writes it"
    LORAMOE_PATHS = "LoRAMoE with module paths"
    LORACOE = "LoRACoE"


_BY_KEY = (
    (re.compile(r"mixlora\.layers\."), Container.MIXLORA),
    (re.compile(r"loramoe\.layers\."), Container.LORAMOE),
    (re.compile(r"mola\.layers\."), Container.MOLA),
    (
        re.compile(r"base_model\.model\..+\.(lora_route\.weight|lora_[AB]\.?\d+\.weight)"),
        Container.LORAMOE_PATHS,
    ),
    (re.compile(r"base_model\.model\..+\.lora_router\.weight"), Container.LORACOE),
)
_PLAIN = re.compile(r"base_model\.model\..+\.lora_[AB]\.(?:[^.]+\.)?weight")
_REFUSED = (
    (
        re.compile(r"(?<![a-z])xlora"),
        "it is an X-LoRA classifier: every token takes a pass over the base without adapters and then a "
        "second one, with no cache, and not on a 4-bit base; the adapters it mixes can be experts of a pool",
    ),
    (
        re.compile(r"^classifier|(^|\.)score\.weight$"),
        "it is the head of a sequence classifier (task type SEQ_CLS), and only text is generated here",
    ),
    (re.compile(r"magnitude"), "it is a DoRA magnitude, and DoRA is not served"),
)


def detect(
    path: Path, keys: Iterable[str], *, peft_type: object = None, metadata: Mapping[str, str] | None = None
) -> Container:
    """Tell the container.

    Args:
        path: of the file, for messages.
        keys: of its tensors.
        peft_type: of the config: X-LoRA's, and LoRACoE's after the warm-up, whose keys are a plain LoRA's.
        metadata: of the file's header, which says the same of LoRACoE.

    Raises:
        AdapterFormatError: no tensors, or those of several containers.
        UnsupportedAdapterError: a tensor that is never served, a plain LoRA, or keys of no known container.
    """
    found: dict[Container, str] = {}
    plain = unknown = None
    names = sorted(keys)
    for key in names:
        for pattern, reason in _REFUSED:
            if pattern.search(key):
                raise UnsupportedAdapterError(f"{path}: tensor {key} is not served: {reason}")
        container = next((kind for pattern, kind in _BY_KEY if pattern.match(key)), None)
        if container is not None:
            found.setdefault(container, key)
        elif _PLAIN.fullmatch(key):
            plain = plain or key
        else:
            unknown = unknown or key
    if peft_type == "XLORA":
        raise UnsupportedAdapterError(f"{path}: peft_type is 'XLORA': {_REFUSED[0][1]}")
    if set(found) == {Container.LORAMOE_PATHS, Container.LORACOE}:
        # `lora_router` is what both call it; experts with numbers are LoRAMoE's alone.
        del found[Container.LORACOE]
    if len(found) > 1:
        told = "; ".join(f"{key} is {container}" for container, key in found.items())
        raise AdapterFormatError(f"{path}: tensors of several containers in one file: {told}")
    if found:
        return next(iter(found))
    if plain and (peft_type == "LORACOE" or (metadata or {}).get("format") == "loracoe"):
        return Container.LORACOE
    if plain:
        raise UnsupportedAdapterError(
            f"{path}: {plain} belongs to a plain LoRA; add it to the pool as an expert"
        )
    if not names:
        raise AdapterFormatError(f"{path}: it holds no tensors")
    raise UnsupportedAdapterError(f"{path}: tensor {unknown} belongs to no mixture that is served")
