"""Every verb alike: a help with an example that is one, the same options for the same things, and man pages."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from command import verbs, vmm_here
from places import TOP

from vmm.cli.commands import cli
from vmm.cli.examples import EXAMPLES

VERBS = dict(verbs())
LEAVES = {name: each for name, each in VERBS.items() if not isinstance(each, click.Group)}


def arguments(example: str) -> list[str]:
    """What a shell makes of the first ``vmm`` in it."""
    inner = re.search(r"\$\((.*)\)", example)
    words = shlex.split(inner[1] if inner else example)
    words = words[words.index("vmm") + 1:]
    ends = [i for i, word in enumerate(words) if word in ("|", ">", "<", "&&")]
    return words[:ends[0]] if ends else words


def parsed(words: list[str]) -> str:
    """The verb's words; whoever cannot be parsed raises what click does."""
    context, command, named = click.Context(cli), cli, ""
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        named, command = f"{named} {name}".strip(), found
    command.make_context(named, list(words))
    return named


def test_every_verb_has_an_example_and_no_example_is_of_none() -> None:
    assert set(EXAMPLES) == set(VERBS)


@pytest.mark.parametrize("verb", EXAMPLES)
def test_an_example_is_of_its_verb_and_can_be_parsed(verb: str) -> None:
    for example in EXAMPLES[verb]:
        found = parsed(arguments(example))
        assert found == verb or found.startswith(f"{verb} "), example


@pytest.mark.parametrize("verb", VERBS)
def test_its_help_shows_it(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = vmm_here(*verb.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: vmm {verb} ")
    for example in EXAMPLES[verb]:
        assert f"\n    {example}\n" in done.stdout
    said = done.stdout.partition("Examples:")[0]
    assert max(map(len, said.splitlines())) <= 80, done.stdout


@pytest.mark.parametrize("verb", LEAVES)
def test_options_are_alike(verb: str) -> None:
    """One way to name a thing, everywhere: --json, --time, --interval, --output, --force, --name, --detach."""
    options = {name: each for each in LEAVES[verb].params if isinstance(each, click.Option) for name in each.opts}
    for name, option in options.items():
        assert re.fullmatch(r"--[a-z]+(-[a-z]+)*|-[a-z]", name), name
        if not option.hidden:
            sentence = re.sub(r"\s*\[[^]]*\]$", "", option.help or "")      # less what its default is
            assert re.fullmatch(r"(?s)[A-Z-].*\.\)?", sentence), f"{name}: {option.help}"
        if option.type.name == "duration":
            assert name != "--duration" or "--time" in option.opts
    if verb not in ("completion", "exporter", "forward", "root", "run", "schema", "top"):
        assert "--json" in options
    assert LEAVES[verb].help


def test_the_first_help_has_each_verb_once_with_a_whole_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = vmm_here("--help").stdout
    listed = re.findall(r"(?m)^  ([a-z][a-z-]*) {2,}[A-Z]", text)
    assert sorted(listed) == sorted(name for name in VERBS if " " not in name)
    assert text.count("...") == 1        # of the usage
    assert max(map(len, text.splitlines())) <= 80


def test_the_documentation_lists_those_without_json() -> None:
    """docs/cli.md, in one sentence."""
    text = " ".join((TOP / "docs" / "cli.md").read_text().split())
    sentence = re.search(r"Every verb takes `--json`, except (.*?) \(`--report-json", text)
    assert sentence is not None
    said = re.findall(r"`([a-z]+)`", sentence[1])
    without = [name for name, each in LEAVES.items() if not any("--json" in param.opts for param in each.params)]
    assert sorted(said) == sorted(without)


def test_migrate_shows_the_options_that_it_has() -> None:
    text = vmm_here("migrate", "--help").stdout
    assert "--postcopy" in text
    assert "--recover" in text
    assert re.search(r"(?m)^  cancel ", text)


@pytest.mark.parametrize(("arguments", "said"), [
    (["status"], "Missing argument 'NAME' (see vmm status --help)"),
    (["pasue", "web"], "No such command 'pasue'. Did you mean 'pause'? (see vmm --help)"),
    (["xyzzy"], "No such command 'xyzzy' (see vmm --help)"),
    (["wait", "--vcpus", "2"], "No such option '--vcpus' (see vmm wait --help)"),
    (["snapshot", "crate"], "No such command 'crate' (see vmm snapshot --help)"),
])
def test_errors_of_usage_are_one_line(arguments: list[str], said: str) -> None:
    done = vmm_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vmm: error: ")
    assert done.stderr.count("\n") == 1
    if "crate" not in arguments:        # click may suggest another there
        assert done.stderr == f"vmm: error: {said}\n"
