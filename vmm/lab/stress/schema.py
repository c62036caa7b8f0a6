"""The published JSON schema of a sweep's file."""

from __future__ import annotations

from typing import Any

from ...client.schema import PlainSchema
from .sweep import Sweep

__all__ = ["sweep_schema"]


def sweep_schema() -> dict[str, Any]:
    """An axis is a list or a single value."""
    schema = Sweep.model_json_schema(schema_generator=PlainSchema)
    keys = schema["properties"]
    keys["dirty_limit"]["items"]["anyOf"].append({"const": "none"})
    keys["workload"]["items"] = {"anyOf": [{"type": "string"}, keys["workload"]["items"]]}
    keys["verify"]["anyOf"].insert(0, {"type": "boolean"})
    for key, value in keys.items():
        if value.get("type") == "array":
            more = {name: value.pop(name) for name in ("default", "description") if name in value}
            keys[key] = {"anyOf": [value["items"], value], **more}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
