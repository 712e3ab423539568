"""A base in NF4, for training and for serving: linear weights with the values that bitsandbytes gives them.

A processor without CUDA multiplies with NF4 by decoding it at every call. Decoded once, the weights are the
same numbers, and a step costs what it costs in float32: a test holds both to the same logits.
"""

from pathlib import Path

from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoTokenizer

from benchmarks.judge import weight_of
from loramux.server.engine.model import load_base


def write_nf4(base: Path, out: Path) -> Path:
    """A copy of a model folder whose linear weights have the values of NF4 with double quantisation.

    Embeddings, norms and the output matrix stay as they are, as they do in QLoRA.
    """
    if (out / "config.json").is_file():
        return out
    model = load_base(base, dtype="float32", quantization="nf4", device="cpu")
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(weight_of(module), requires_grad=False)
            if module.bias is not None:
                plain.bias = module.bias
            model.set_submodule(name, plain)
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    partial = out.with_name(out.name + ".partial")
    copy.float().save_pretrained(partial)
    copy.generation_config.save_pretrained(partial)
    AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(partial)
    partial.replace(out)
    return out
