"""The long set, marked ``long``: more of the same, where a few say nearly as much. ``pytest -m ""`` runs all.

Without KVM nothing of the machines is in it: what runs on the software CPU is all there is then.
"""

from __future__ import annotations

import re

import needs

__all__ = ["has"]

#: What is above the accelerator is tried on one: KVM.
_ABOVE = re.compile(r"tests/(cli|client|consumers|coordinator|lab)/[^[]*\[(?!.*kvm).*unicorn")
#: But what the software CPU has a part in: what goes on elsewhere, the dirty limit, how a guest ends, a first launch.
_IN_PART = re.compile(r"as_one_that_was_never|goes_on_after_a_migration|a_limit_is_never_exceeded|a_bad_guest_ends"
                      r"|test_no_page_is_lost\[|vcpu_that_had_ended|quickstart|nothing_to_say|check_reads|works_badly"
                      r"|a_sweep_that_cannot|moved_chain")

_LONG = re.compile("|".join([
    # two machines of each kind, one way, of all that move
    r"restored_machine_ends_as_one_that_was_never_stopped\[(?P<one>\w+)-\w+-(?P=one)\]",
    r"never_stopped\[\w+-(pingpong|counter)-",
    r"moved_machine_ends_as_one_that_was_never_moved\[(?P<other>\w+)-(?P=other)-", r"never_upgraded\[unicorn",
    # the walk and the bad workers on KVM; the log's rules too, but where each accelerator has its own part
    r"(test_walk|test_bad_workers)\.py::.*\[unicorn", r"test_measured\.py::.*unicorn",
    r"test_tracking\.py::(?!test_uffd|.*switch).*\[unicorn",
    r"test_any_number_of_vcpus_and_any_ring\[kvm-", r"however_many_vcpus\[(unicorn-(1|2|8)|kvm-(2|8))\]",
    r"test_merging_takes_little_memory_whatever_the_slots_size\[True", r"runs_as_it_says\[replay-256-rings",
    r"test_each_runs_at_its_smallest_or_says_why_not\[(coordinator|dirty_limit|dirtying|harvest|log_cost|migration"
    r"|predict|replay|snapshot|tracked)",
    r"test_close_ends_a_machine_whose_coordinator_stands_still", r"test_a_small_comparison_is_kept_and_carried_on",
    r"test_two_machines_at_once", r"everything_is_read_when_nobody_prints",
    r"test_kicks_and_reaps_do_not_disturb_the_guest", r"the_guest_is_not_disturbed_by_switches",
    r"over_tcp_with_keys\[\[", r"test_a_short_campaign_loses_nothing\[unicorn", r"test_to_and_fro\[False",
    r"test_examples_run\[tutorial", r"coordinators_die_meanwhile\[False",
    r"any_sequence_of_snapshots_migrations_and_restores\[1-",
    # the kills at each step of a hand-over are in test_handover.py; of what is made of them, one before, one after
    r"after_the_hand_over_is_replaced\[migrate-(stop|done)-", r"leaves_the_source_to_a_person\[receive-\w+-foreground",
    r"killed_after_it_went_over_to_post_copy\[migrate-(?!hand-over|commit)",
    r"it_goes_on_in_the_old\[migrate-(?!hand-over)", r"it_gets_its_name_back\[(?!upgrade-between)",
    r"the_second_hand_over_is_finished.*\[(?!receive-started)", r"test_upgrade\.py::.*are_replaced\[(?!start-taken)",
    # a search of some minutes where memory is slow; its mutants are not
    r"test_a_model_has_no_error_whatever_happens_in_it\[reap",
]))


def has(test: str) -> bool:
    """``test``: its node id."""
    return not needs.missing("kvm") and bool(
        _LONG.search(test) or (_ABOVE.search(test) and not _IN_PART.search(test)))
