"""Servers, databases and a JVM that go on elsewhere while they work: nothing of what they have is lost. (With
``-m ''``.)"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from debian_roots import root_of
from inside import natively
from moving import Followed, begun, migrated, name_of

from vmm.consumers import snapshot
from vmm.errors import VmmError

pytestmark = [pytest.mark.kvm, pytest.mark.long, pytest.mark.timeout(1500)]

_REDIS = r"""
redis-server --save '' > /tmp/log 2>&1 &
until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done
echo ready
(for i in $(seq 1 "$1"); do echo "SET k$i $i"; done | redis-cli > /tmp/set; echo "set $(grep -c OK /tmp/set)") &
redis-benchmark -n "$1" -r 100000 -P 8 -c 4 -t set,incr,lpush -q > /tmp/bench 2>&1; echo "benchmark $?"
wait $!
sum=0; for i in $(seq 1 7 "$1"); do echo "GET k$i"; done | redis-cli | md5sum
redis-cli llen mylist; redis-cli shutdown nosave
"""

_SQL = r"""
rm -f /tmp/db       # of the native run
sqlite3 /tmp/db 'create table t(a integer primary key, b text); create index i on t(b)'; echo begun
for n in $(seq 0 99); do
    sqlite3 /tmp/db "begin; with recursive n(i) as (select 1 union all select i + 1 from n where i < 1000)
        insert into t select $n * 1000 + i, printf('%x', i * 2654435761 % 4294967296) from n; commit"
done
sqlite3 /tmp/db 'pragma integrity_check; select count(*), min(b), max(b), sum(length(b)) from t'
"""

_JAVA = """
import java.util.*;
public class Load {
    static long part(int seed, int rounds) {
        Random random = new Random(seed);
        Map<Integer, int[]> kept = new HashMap<>();
        long sum = 0;
        for (int i = 0; i < rounds; i++) {
            int[] made = new int[200 + random.nextInt(2000)];
            for (int j = 0; j < made.length; j += 50) made[j] = random.nextInt();
            kept.put(random.nextInt(2000), made);
            if (i % 1000 == 0)
                for (int[] each : kept.values()) for (int j = 0; j < each.length; j += 50) sum = sum * 31 + each[j];
        }
        return sum;
    }
    public static void main(String[] arguments) throws Exception {
        System.out.println("begun");
        long[] sums = new long[3];
        Thread[] threads = new Thread[sums.length];
        for (int i = 0; i < sums.length; i++) {
            int n = i;
            threads[i] = new Thread(() -> sums[n] = part(n, Integer.parseInt(arguments[0])));
            threads[i].start();
        }
        for (Thread each : threads) each.join();
        System.out.println(Arrays.toString(sums));
    }
}
"""


@pytest.fixture(scope="module")
def databases() -> Path:
    return root_of("databases", "redis-server", "redis-tools", "sqlite3", "coreutils", "dash", "grep")


@pytest.mark.parametrize("postcopy", [False, True])
def test_redis_while_it_is_asked(databases: Path, tmp_path: Path, postcopy: bool) -> None:
    """Every key is there, and what was counted."""
    command = ["sh", "-c", _REDIS, "redis", "30000"]
    native = natively(databases, *command)
    with contextlib.ExitStack() as stack:
        program, trees = stack.enter_context(begun(databases, name_of("redis"), *command, memory=256 << 20,
                                                   threads=24))
        program.until("ready\n")
        for _ in range(2):
            program.listen(1.0)
            program = stack.enter_context(migrated(program, trees, tmp_path, name_of("redis"), postcopy=postcopy))
        program.end()
    assert sorted(program.said.splitlines()) == sorted(native.output.decode().splitlines())


def test_sqlite_saved_every_second(databases: Path, tmp_path: Path) -> None:
    """Each snapshot is built on the one before, and each has a database that is whole."""
    command = ["sh", "-c", _SQL]
    native = natively(databases, *command)
    assert b"ok\n100000|" in native.output
    before = []
    with begun(databases, name_of("sqlite"), *command) as (program, trees):
        program.until("begun\n")
        with contextlib.suppress(VmmError):     # it has ended
            while "ok\n" not in program.said:
                snapshot.create(program.machine, tmp_path / "chain", live=len(before) % 2 == 1,
                                incremental=len(before) > 0)
                before.append(program.said)
                program.listen(1.0)
        program.end()
        assert program.said.splitlines() == native.output.decode().splitlines()
    assert len(before) > 3
    for number, said in list(enumerate(before[:-1], 1))[::4]:       # the last may have been taken when it was over
        with snapshot.restore(tmp_path / "chain", f"{number:04d}", machine_name=name_of("again"),
                              trees=trees) as machine:
            again = Followed(machine, said)
            again.end()
            assert again.said.splitlines() == native.output.decode().splitlines()


def test_a_jvm_that_collects_garbage(tmp_path: Path) -> None:
    """Post-copy, to and fro."""
    root = root_of("java", "openjdk-17-jre-headless")
    (root / "root" / "Load.java").write_text(_JAVA)
    java, = (f"/{each.relative_to(root)}" for each in root.glob("usr/lib/jvm/java-17-openjdk-*/bin/java"))
    command = [java, "-Xmx128m", "-XX:+UseParallelGC", "/root/Load.java", "60000"]
    native = natively(root, *command, proc=True)
    assert native.code == 0, native
    with contextlib.ExitStack() as stack:
        program, trees = stack.enter_context(begun(root, name_of("java"), *command, memory=768 << 20, threads=32))
        program.until("begun\n")
        for _ in range(2):
            program = stack.enter_context(migrated(program, trees, tmp_path, name_of("java"), postcopy=True))
            program.listen(1.0)
        program.end()
    assert program.said.splitlines() == native.output.decode().splitlines()
