"""The doctor says what is so: compared with what the kernel says by other ways."""

from __future__ import annotations

import os
import shutil

from vmm.doctor import examine, healthy
from workers import kvm


def test_findings_agree_with_the_host() -> None:
    findings = {f.name: f for f in examine()}
    total = shutil.disk_usage("/dev/shm").total
    assert findings["/dev/shm"].finding.startswith(f"{total / (1 << 30):.1f} GiB")
    assert (findings["kvm"].status == "ok") == os.access("/dev/kvm", os.R_OK | os.W_OK)
    if "dirty ring" in findings and findings["dirty ring"].status == "ok":
        assert str(kvm.probe().max_entries) in findings["dirty ring"].finding
    assert findings["unicorn"].status == "ok"
    assert healthy(list(findings.values()))


def test_no_accelerator_or_something_essential_missing_is_not_healthy() -> None:
    findings = examine()
    without = [f for f in findings if f.name not in ("kvm", "unicorn")]
    assert not healthy(without)
