"""Give the layers of a loaded model weights that stay as they are stored."""

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loramux.kernels.packed_linear.kinds import Kind, Packed, pack
from loramux.kernels.packed_linear.stored import StoredEmbedding, StoredLinear


class Kinds(NamedTuple):
    """How the linear layers are stored, and how embeddings and the output head.

    `given` says it of single layers, by their paths, before the others; None leaves one as it is.
    """

    linear: Kind
    embedding: Kind
    given: Mapping[str, Kind | None] = MappingProxyType({})


class Place(NamedTuple):
    """A layer that is to be stored, where it is, and how."""

    parent: nn.Module
    name: str
    path: str
    layer: nn.Linear | nn.Embedding
    kind: Kind


def storable(model: nn.Module, kinds: Kinds) -> list[Place]:
    """The layers that `store_weights` replaces. A head that is tied to the embedding has its kind, as has the
    head of a transformers model; subclasses of linear layers, which may compute something else, are left."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    places = []
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if type(child) is nn.Linear:
                outer = child is head or id(child.weight) in embedded
                kind = kinds.given.get(path, kinds.embedding if outer else kinds.linear)
            elif isinstance(child, nn.Embedding) and _is_plain(child):
                kind = kinds.given.get(path, kinds.embedding)
            else:
                continue
            if kind is not None:
                places.append(Place(parent, name, path, child, kind))
    return places


def store_weights(
    model: nn.Module,
    kinds: Kinds,
    packed_as_given: Callable[[str], Packed] | None = None,
    *,
    invariant: bool = False,
) -> int:
    """Replace linear layers and embeddings of a frozen model on the CPU; returns how many.

    What remains (norms, biases, buffers) becomes float32, in which the layers compute. Layers are packed one
    by one, and give up what they had before; tied ones share one matrix.

    Args:
        model: its elements of layers that `kinds.given` names do not matter.
        kinds: how.
        packed_as_given: the matrix of a layer that `kinds.given` names, by its path.
        invariant: as `StoredLinear` has it.
    """
    places = storable(model, kinds)
    uses = Counter(id(place.layer.weight) for place in places)
    shared: dict[int, tuple[Tensor, Packed]] = {}  # with the weight, whose id must not be given to another
    for place in places:
        weight = place.layer.weight
        if id(weight) in shared:
            packed = shared[id(weight)][1]
        elif packed_as_given is not None and place.path in kinds.given:
            packed = packed_as_given(place.path)
        else:
            packed = pack(weight, place.kind)
        if uses[id(weight)] > 1:
            shared[id(weight)] = (weight, packed)
        if isinstance(place.layer, nn.Linear):
            made: nn.Module = StoredLinear(packed, place.layer.bias, invariant=invariant)
        else:
            made = StoredEmbedding(packed, float(getattr(place.layer, "embed_scale", 1.0)))
        setattr(place.parent, place.name, made.train(place.layer.training))
        place.layer.weight = None  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and tensor.device.type != "meta":
            tensor.data = tensor.data.float()
    return len(places)


def _is_plain(layer: nn.Embedding) -> bool:
    """Whether it looks up rows and at most multiplies them by `embed_scale`."""
    if isinstance(layer, StoredEmbedding):  # is stored already
        return False
    return layer.max_norm is None and (type(layer) is nn.Embedding or hasattr(layer, "embed_scale"))
