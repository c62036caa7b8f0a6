"""Configurations to begin with: what a machine needs, and all other keys as comments, each with its default (or an
example) and what it means. A key is ``#key: value``, so that it counts once the ``#`` is taken away; other comments
have a blank."""

from __future__ import annotations

import textwrap
from typing import Any

from ..errors import VmmError
from ..tables import size_text
from .schema import KeyDoc, key_docs

__all__ = ["TEMPLATES", "template"]

_WIDTH = 100
_SCHEMA = "config.schema.json"

_GUEST = {"vcpus": "vcpus: 2", "memory": "memory:\n  - size: 64MiB", "verify": "verify: true",
          "timeout": "timeout: 60s"}
#: {template: (what it makes, {key at the top: its lines}, keys below the section that it may have)}
TEMPLATES: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "guest": ("A machine that runs a sample guest.",
              {**_GUEST, "guest": "guest:\n  workload: random\n  params: {writes: 100000}"}, ()),
    "image": ("A machine that runs a static x86-64 ELF file, or a flat binary.",
              {**_GUEST, "guest": "guest:\n  image: guest.elf"}, ("guest.params", "guest.address")),
    "program": ("A machine that runs a Linux program (docs/linux.md).",
                {"memory": "memory:\n  - size: 256MiB",
                 "guest": "guest:\n  program: sh\n  args: [-c, echo hello]\n  root: /",
                 "timeout": "timeout: 5min"},
                ("guest.env", "guest.files", "guest.directory", "guest.threads", "guest.seed", "guest.forward")),
    "replay": ("Rings that are driven by a pattern, without CPU and memory.",
               {"vcpus": "vcpus: 4", "accel": "accel: replay", "memory": "memory:\n  - size: 64GiB",
                "replay": "replay:\n  pattern: random\n  writes: 1000000", "timeout": "timeout: 60s"},
               ("replay.rate", "replay.seed", "replay.shared", "replay.repeat")),
    "machines": ("Several machines. What stands at the top holds for each that does not say otherwise.",
                 {**_GUEST, "machines": "machines:\n  one:\n    guest: {workload: random}\n  two:\n    vcpus: 1\n"
                                        "    guest: {workload: stamp}"}, ()),
}
#: Not valid with a program.
_NO_PROGRAM = ("vcpus", "privilege", "stack_size")
#: Not valid in a replay, or without a use there.
_NO_REPLAY = ("privilege", "stack_size", "tracking", "nice")


def template(name: str) -> str:
    """Raises VmmError where there is none of that name."""
    if name not in TEMPLATES:
        raise VmmError(f"there is no template '{name}': choose from {', '.join(TEMPLATES)}")
    title, given, below = TEMPLATES[name]
    without = {"program": _NO_PROGRAM, "replay": _NO_REPLAY}.get(name, ())
    parts = [f"# yaml-language-server: $schema={_SCHEMA}\n# {title}\n#\n"
             f"# vmm config check FILE    checks this file; vmm config explain KEY says more of a key\n"
             f"# vmm schema > {_SCHEMA}    gives editors what they need to complete and check it\n"]
    docs = key_docs()
    for doc in docs.values():
        if "." in doc.name or doc.name in without or (doc.name in ("guest", "replay", "machines") and (
                doc.name not in given)) or (doc.name == "name" and name == "machines"):
            continue
        lines = [*_comment(doc.description, "")]
        if doc.name in given:
            lines += given[doc.name].split("\n")
            extra = [docs[key] for key in below if key.startswith(f"{doc.name}.")]
            extra += [docs[f"memory.N.{key}"] for key in ("slot", "gpa", "log")] if doc.name == "memory" else []
            indent = "    " if doc.name == "memory" else "  "
            for each in extra:
                key = each.name.rpartition(".")[2]
                lines += [*_comment(each.description, indent), f"{indent}#{key}: {_value(each)}"]
        elif doc.below and doc.default is None and doc.name != "verify":
            lines += [f"#{doc.name}:"]
            for key in doc.below:
                lines += [*_comment(docs[key].description, "#  "),
                          f"#  {key.rpartition('.')[2]}: {_value(docs[key])}"]
        else:
            lines += [f"#{doc.name}: {_value(doc)}"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                         break_on_hyphens=False, break_long_words=False)


#: Where neither a default nor an example of the schema says what may be written.
_EXAMPLES = {"name": "vm", "tracking": "auto", "verify": "true", "guest.threads": "8", "guest.seed": "1",
             "guest.params": "[1, 2]", "guest.forward": '["8080:80"]', "trace": '["kvm_dirty_ring_*"]',
             "guest.env": "{NAME: value}", "guest.files": "{/etc/hosts: /etc/hosts}"}


def _value(doc: KeyDoc) -> str:
    """As it may be written."""
    if doc.name in _EXAMPLES:
        return _EXAMPLES[doc.name]
    if doc.default is None:
        return doc.examples[0] if doc.examples else "0"
    return value_text(doc.title, doc.default)


def value_text(title: str, value: Any) -> str:
    """A default, as people write it. ``title``: that of its quantity."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if title == "size" and value:
        return size_text(value).replace(" ", "")
    if title == "duration":
        return f"{value:g}s" if value >= 1 else f"{value * 1000:g}ms"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
