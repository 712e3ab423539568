"""How models write the calls of tools: by name, as templates of transformers' response parser.

`hermes` is also what Qwen 2.5 and Qwen 3 write; `qwen` is what Qwen3-Coder and Qwen 3.5 write.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing.response_templates import load_response_template

FormatName = Literal["hermes", "llama3", "mistral", "qwen"]

_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}
_CONTENT = {"content": "text", "content_args": {"strip": False}}
_CHATML = "<|im_start|>assistant\n"

TEMPLATES: Mapping[FormatName, dict[str, Any]] = {
    # <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number of them
    "hermes": {
        "start_anchor": _CHATML,
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {
                    "type": "function",
                    "function": {"name": "{content.name}", "arguments": "{content.arguments}"},
                },
            },
            "content": _CONTENT,
        },
    },
    # {"name": "f", "parameters": {…}} and nothing else
    "llama3": {
        "start_anchor": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r'\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*"(?:name|type)"\s*:)',
                "repeats": True,
                "content": "json",
                "transform": {
                    "type": "function",
                    "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
                },
            },
            "content": _CONTENT,
        },
    },
    # [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]
    "mistral": {
        "start_anchor": "[/INST]",
        "fields": {
            "tool_calls": {
                "open": "[TOOL_CALLS]",
                "repeats": True,
                "content": "json",
                "transform": _NAMED,
                "transform_each": True,
            },
            "content": _CONTENT,
        },
    },
    # <tool_call><function=f><parameter=a>1</parameter></function></tool_call>, any number of them
    "qwen": {
        "start_anchor": _CHATML,
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
                },
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": _CONTENT,
        },
    },
}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How the base of a server writes calls.

    Attributes:
        name: of the format, where it is one of those above.
        template: of the response parser: the tokenizer's own, or the format's.
    """

    name: FormatName | None
    template: Mapping[str, Any]

    @property
    def markers(self) -> str:
        """Text that holds every marker of the template."""
        return json.dumps(self.template, ensure_ascii=False).replace("\\\\", "")

    def answer_so_far(self, prompt: str) -> str:
        """What of the answer the prompt has written already; nothing where it shows no beginning of one."""
        spec = load_response_template(dict(self.template))
        begun = bool(spec.start_anchor_re.search(prompt))
        return str(spec.truncate_past_last_anchor(prompt)) if begun else ""


def find_format(tokenizer: Any, wanted: FormatName | Literal["auto"]) -> ToolFormat | None:
    """The format of a tokenizer's base: the one that is `wanted`; else its own response template, or the
    format that its chat template speaks of."""
    if wanted != "auto":
        return ToolFormat(wanted, TEMPLATES[wanted])
    name = spoken_of(template_text(tokenizer.chat_template))
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, dict):
        return ToolFormat(name, own)
    return None if name is None else ToolFormat(name, TEMPLATES[name])


def spoken_of(template: str) -> FormatName | None:
    """The format whose markers a chat template has."""
    if "<tool_call>" in template:
        return "qwen" if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "<|start_header_id|>" in template):
        return "llama3"
    return None


def template_text(template: object) -> str:
    """A chat template, or all of several by name."""
    if isinstance(template, Mapping):
        return "\n".join(str(one) for one in template.values())
    return template if isinstance(template, str) else ""


def knows_tools(template: str) -> bool:
    """Whether a chat template does anything with tools."""
    return re.search(r"\{[{%][^}]*\btools\b", template) is not None
