"""QEMU's own word on what QMP is: the schema that a real one gives (query-qmp-schema), and whether a document keeps to
it. It shares no code with what answers."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import threading
from typing import Any

import pytest

__all__ = ["QEMU", "Schema", "qemu_schema"]

QEMU = "qemu-system-x86_64"
_NAMES = ("qmp_capabilities", "query-qmp-schema")


@functools.cache
def qemu_schema() -> Schema:
    """Of the QEMU that is installed. Skips where there is none."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    with subprocess.Popen([QEMU, "-machine", "none", "-nodefaults", "-nographic", "-no-user-config", "-qmp", "stdio"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        timer = threading.Timer(60.0, process.kill)
        timer.start()
        answers: dict[str | None, Any] = {}
        try:
            with contextlib.suppress(BrokenPipeError):
                for name in _NAMES:
                    process.stdin.write(json.dumps({"execute": name, "id": name}) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                answers[answer.get("id")] = answer
                if _NAMES[-1] in answers:       # (a quit before would end it with the answer half written)
                    break
        finally:
            process.kill()
            timer.cancel()
        if "return" not in answers.get("query-qmp-schema", {}):
            pytest.skip(f"{QEMU} gives no schema: {process.stderr.read().strip()}")
    return Schema(answers["query-qmp-schema"]["return"])


class Schema:
    """As QEMU's SchemaInfo has it; commands and events are known by their names, types by numbers."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self._entities = {(each["meta-type"] in ("command", "event"), each["name"]): each for each in entities}

    def knows(self, name: str) -> bool:
        """A command or an event."""
        return (True, name) in self._entities

    def _type(self, name: str) -> dict[str, Any]:
        return self._entities[False, name]

    def takes(self, command: str) -> dict[str, bool]:
        """{name of an argument: it may be left out}."""
        return {each["name"]: "default" in each
                for each in self._type(self._entities[True, command]["arg-type"])["members"]}

    def wrong_answer(self, command: str, answer: Any) -> list[str]:
        """What of the answer is not as it must be."""
        return list(self._wrong(self._entities[True, command]["ret-type"], answer, command))

    def wrong_event(self, name: str, data: dict[str, Any]) -> list[str]:
        """What of the event is not as it must be."""
        if not self.knows(name):
            return [f"there is no event {name}"]
        return list(self._wrong(self._entities[True, name]["arg-type"], data, name))

    def _wrong(self, name: str, value: Any, where: str) -> list[str]:
        kind = self._type(name)
        match kind["meta-type"]:
            case "builtin":
                fits = {"string": isinstance(value, str), "boolean": isinstance(value, bool),
                        "int": isinstance(value, int) and not isinstance(value, bool),
                        "number": isinstance(value, int | float) and not isinstance(value, bool),
                        "null": value is None, "value": True, "object": isinstance(value, dict)}[kind["json-type"]]
                return [] if fits else [f"{where}: {value!r} is no {kind['json-type']}"]
            case "enum":
                return [] if value in kind["values"] else [f"{where}: {value!r} is none of {kind['values']}"]
            case "array":
                if not isinstance(value, list):
                    return [f"{where}: {value!r} is no array"]
                return [text for n, each in enumerate(value)
                        for text in self._wrong(kind["element-type"], each, f"{where}[{n}]")]
            case "alternate":
                tried = [self._wrong(each["type"], value, where) for each in kind["members"]]
                return [] if [] in tried else [f"{where}: {value!r} is none of its alternatives"]
            case "object":
                return self._wrong_object(kind, value, where)
        raise AssertionError(kind)

    def _wrong_object(self, kind: dict[str, Any], value: Any, where: str) -> list[str]:
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no object"]
        members = {each["name"]: each for each in kind["members"]}
        for variant in kind.get("variants", []):
            if variant["case"] == value.get(kind["tag"]):
                members |= {each["name"]: each for each in self._type(variant["type"])["members"]}
        found = [f"{where}.{name} is missing" for name, each in members.items()
                 if "default" not in each and name not in value]
        found += [f"{where}.{name} is not known" for name in value if name not in members]
        return found + [text for name in members.keys() & value.keys()
                        for text in self._wrong(members[name]["type"], value[name], f"{where}.{name}")]
