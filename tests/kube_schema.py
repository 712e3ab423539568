"""The schema of a Kubernetes resource, read strictly: what it does not name is a mistake.

`python tests/kube_schema.py CRD MANIFEST OUT` writes the part of it that a manifest touches, without
descriptions, with where it is from.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
#: What says which values are right. Descriptions are no part of it.
_RULES = ("type", "enum", "required", "minimum", "maximum", "pattern", "maxLength", "minLength", "format")


def schema_of(crd: Path, version: str) -> Json:
    """The schema of one version in a CustomResourceDefinition."""
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    found: Json = next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == version)
    return found


def strict(schema: Mapping[str, Any]) -> Json:
    """The same without what only a cluster reads; names that are not listed are refused."""
    found: Json = {name: schema[name] for name in _RULES if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        found["properties"] = {name: strict(one) for name, one in schema["properties"].items()}
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), Mapping):
        found["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = strict(schema["items"])
    return found


def resource(schema: Mapping[str, Any]) -> Json:
    """`strict`, of a whole resource, whose name the schema leaves to Kubernetes."""
    found = strict(schema)
    found["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}},
        "additionalProperties": False,
    }
    return found


def touched(schema: Json, value: Any) -> Json:
    """The part of a strict schema that a value touches; what it requires stays."""
    found = dict(schema)
    if isinstance(value, list) and "items" in schema:
        parts = [touched(schema["items"], one) for one in value]
        found["items"] = _united(parts) if parts else schema["items"]
    if isinstance(value, dict) and "properties" in schema:
        found["properties"] = {
            name: touched(one, value[name]) for name, one in schema["properties"].items() if name in value
        }
    return found


def _united(parts: list[Json]) -> Json:
    """Of schemas of one place, each the part that one value touches."""
    found = dict(parts[0])
    if names := {name for part in parts for name in part.get("properties", {})}:
        found["properties"] = {
            name: _united([part["properties"][name] for part in parts if name in part["properties"]])
            for name in sorted(names)
        }
    return found


if __name__ == "__main__":
    crd, manifest, out = map(Path, sys.argv[1:])
    value = yaml.safe_load(manifest.read_text())
    part = touched(resource(schema_of(crd, value["apiVersion"].rpartition("/")[2])), value)
    part = {"$comment": json.loads(out.read_text())["$comment"] if out.exists() else "", **part}
    out.write_text(json.dumps(part, indent=1) + "\n")
