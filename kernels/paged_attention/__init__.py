"""Attention of a decode step over a paged cache: every row has one new token and pages of its own."""

from importlib.util import find_spec

import torch

from loramux.kernels.paged_attention.form import Form
from loramux.kernels.paged_attention.gathered import GatheredForm
from loramux.kernels.paged_attention.native import FUNCTIONS, LANES, NativeForm, library
from loramux.kernels.paged_attention.prompt import prompt_attention
from loramux.kernels.paged_attention.reference import attention_reference, paged_attention_reference
from loramux.kernels.paged_attention.rows import Rows, Scores, store_

__all__ = [
    "LANES",
    "Form",
    "GatheredForm",
    "NativeForm",
    "Rows",
    "Scores",
    "attention_reference",
    "choose_form",
    "paged_attention_reference",
    "prompt_attention",
    "store_",
]


def choose_form(device: torch.device, dtype: torch.dtype) -> Form:
    """The fastest form that this machine has for keys and values of this kind."""
    if device.type == "cpu" and dtype in FUNCTIONS and library() is not None:
        return NativeForm(dtype)
    if device.type == "cuda" and find_spec("triton") is not None:
        from loramux.kernels.paged_attention.triton import TritonForm  # compiles, and needs triton

        return TritonForm()
    return GatheredForm()
