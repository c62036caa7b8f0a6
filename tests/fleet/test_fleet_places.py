"""Which host a machine goes to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.client.config import load_config
from vmm.fleet.config import Wanted
from vmm.fleet.members import Member
from vmm.fleet.places import Host, Load, choose, place

GIB = 1 << 30


def host(name: str, cpus: float = 8, memory: int = 8 * GIB, **more: object) -> Host:
    return Host(name, name, "10.0.0.1", cpus, memory, **more)       # type: ignore[arg-type]


def load(name: str = "m", spread: str = "even", cpus: float = 1, memory: int = GIB, **more: object) -> Load:
    return Load(name, "group", spread, cpus, memory, **more)        # type: ignore[arg-type]


def chosen(wanted: Load, *hosts: Host) -> str | None:
    found = choose(wanted, hosts)
    return None if found is None else found.name


def test_where_most_is_free_or_least_or_where_there_is_none_of_its_kind() -> None:
    hosts = [host("a", memory=4 * GIB), host("b", memory=6 * GIB), host("c", memory=2 * GIB)]
    assert chosen(load(), *hosts) == "b"
    assert chosen(load(spread="pack"), *hosts) == "c"
    assert chosen(load(spread="pack", memory=3 * GIB), *hosts) == "a"
    hosts[1].groups.add("group")
    assert chosen(load(spread="apart"), *hosts) == "a"


def test_what_dirties_much_keeps_others_away() -> None:
    busy, quiet = host("a", memory=8 * GIB, rate=200_000.0), host("b", memory=2 * GIB, rate=300.0)
    assert chosen(load(), busy, quiet) == "b"
    assert chosen(load(memory=4 * GIB), busy, quiet) == "a"     # there is no other choice
    assert chosen(load(), host("a", rate=900.0), host("b", memory=9 * GIB, rate=0.0)) == "b"    # both are quiet
    assert chosen(load(), host("a", rate=0.0), host("b", memory=9 * GIB, rate=900.0)) == "b"


def test_a_guest_of_kvm_goes_to_kvm() -> None:
    assert chosen(load(kvm=True), host("a"), host("b", memory=GIB, kvm=True)) == "b"
    assert chosen(load(kvm=True), host("a")) is None


def test_machines_of_one_entry_are_kept_apart_as_long_as_there_are_hosts() -> None:
    found = place([load(f"m{number}", "apart") for number in range(3)], [host("a"), host("b")])
    names = [None if each is None else each.name for each in found.values()]
    assert sorted(name for name in names if name) == ["a", "b"]
    assert names.count(None) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.sampled_from(["even", "pack"])), max_size=12),
       st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20)), max_size=5))
def test_no_host_has_more_than_it_can_and_nobody_is_left_out_who_fits(
        loads: list[tuple[int, int, str]], hosts: list[tuple[int, int]]) -> None:
    wanted = [load(f"m{number}", spread, cpus, memory) for number, (cpus, memory, spread) in enumerate(loads)]
    free = [host(f"h{number}", cpus, memory) for number, (cpus, memory) in enumerate(hosts)]
    found = place(wanted, free)
    assert set(found) == {each.name for each in wanted}
    for number, (cpus, memory) in enumerate(hosts):
        there = [each for each in wanted if (at := found[each.name]) is not None and at.name == f"h{number}"]
        cpus_left, memory_left = cpus - sum(each.cpus for each in there), memory - sum(each.memory for each in there)
        assert cpus_left >= 0
        assert memory_left >= 0
        for each in wanted:
            assert found[each.name] is not None or each.cpus > cpus_left or each.memory > memory_left


def member(name: str, node: str, *, since: float, holder: int = 1, target: str = "") -> Member:
    wanted = Wanted(name, name, load_config("quickstart", [], name=name), 1.0, GIB, "even", None, False)
    return Member(wanted, node, target, holder=holder, state="running", since=since)


def test_memory_of_a_machine_is_counted_once() -> None:
    """What is free on a host is without that of machines which ran there when it was looked at; Ray's figure is with
    it."""
    there = host("a", memory=8 * GIB, free=5 * GIB, looked=100.0)
    member("before", "a", since=50.0).take_from(there)
    assert (there.memory, there.free, there.room) == (7 * GIB, 5 * GIB, 5 * GIB)
    member("after", "a", since=101.0).take_from(there)
    member("starts", "a", since=0.0, holder=0).take_from(there)
    member("comes", "b", since=50.0, target="a").take_from(there)
    member("elsewhere", "b", since=50.0).take_from(there)
    assert (there.memory, there.free, there.room) == (4 * GIB, 2 * GIB, 2 * GIB)
    assert chosen(load(memory=2 * GIB), there) == "a"
    assert chosen(load(memory=3 * GIB), there) is None
