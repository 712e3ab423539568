"""Tokenizers whose chat templates know tools, in each way that calls are written."""

from typing import Any

from tokenizers import AddedToken

from loramux.server.engine.protocol import Work
from tests.kit import byte_tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Köln", "Rome"]},
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                    "at": {"$ref": "#/$defs/point"},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {
                    "point": {
                        "type": "object",
                        "properties": {"north": {"type": "boolean"}},
                        "required": ["north"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]

# How a call is shown to the model; the markers tell a server the format.
_SHOWN = {
    "hermes": "<tool_call>\\n{{ {'name': f.name, 'arguments': f.arguments} | tojson }}\\n</tool_call>",
    "llama3": "<|python_tag|>{{ {'name': f.name, 'parameters': f.arguments} | tojson }}",
    "mistral": "[TOOL_CALLS][{{ {'name': f.name, 'arguments': f.arguments} | tojson }}]",
    "qwen": "<tool_call><function={{ f.name }}>{% for k, v in f.arguments.items() %}"
    "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function></tool_call>",
}
MARKERS = {"hermes": (), "llama3": ("<|python_tag|>",), "mistral": ("[TOOL_CALLS]",), "qwen": ()}


def template(form: str) -> str:
    """A chat template that writes tools, calls and their results."""
    return (
        "<|bos|>{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>"
        "{% endif %}{% for message in messages %}{% if message['role'] == 'tool' %}"
        "<|user|>{{ message['tool_call_id'] }}: {{ message['content'] }}<|end|>"
        "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% for call in message['tool_calls'] or [] %}{% set f = call['function'] %}"
        + _SHOWN[form]
        + "{% endfor %}"
        "{{ '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )  # fmt: skip


def tool_tokenizer(form: str) -> Any:
    """A byte tokenizer whose template knows tools, with the format's markers as special tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(marker, special=True) for marker in MARKERS[form]], special_tokens=True)
    tokenizer.chat_template = template(form)
    return tokenizer


HERMES = tool_tokenizer("hermes")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


class Speaker:
    """The script of an engine: it says `text`."""

    text = ""

    def __call__(self, _: Work) -> list[int]:
        ids: list[int] = HERMES(self.text, add_special_tokens=False)["input_ids"]
        return ids
