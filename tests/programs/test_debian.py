"""Programs that nobody here wrote, unmodified, against the same natively: equal output, equal end, no page lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from debian_roots import root_of
from inside import inside, natively

pytestmark = pytest.mark.kvm

_SHELL = r"""
set -e; mkdir /tmp/$0; cd /tmp/$0
seq 1 3000 > numbers; sort -rn numbers | head -3; md5sum numbers; wc numbers; tail -c 30 numbers
cut -c1-2 numbers | sort | uniq -c | sort -rn | head -5; tac numbers | tr 0-9 a-j | sha1sum
for i in 1 2 3; do (sleep 0.0$i; echo $i); done | paste -s
cp numbers again; cmp numbers again; mv again third; ln -s third link; readlink link; stat -c %s link third
printf '%05d\n' 42; expr 6 \* 7; test -f third; basename /a/b.c .c; dd if=numbers bs=100 count=2 skip=3 2>/dev/null
mkdir -p a/b/c; touch a/b/c/d; ls -R a; rm -r a; ls; split -l 1000 numbers part; cat part* | cmp - numbers
trap 'echo trapped' USR1; kill -USR1 $$; false || echo failed; (exit 7) || echo $?
"""

_PYTHON = r"""
import hashlib, json, os, queue, socket, struct, subprocess, sys, threading, zlib
data = bytes(range(256)) * 400
print(hashlib.sha256(data).hexdigest(), zlib.crc32(zlib.compress(data)), json.dumps({"a": [1, 2.5, None]}))
work, done = queue.Queue(), []
def worker():
    while (item := work.get()) is not None:
        done.append(item * item)
threads = [threading.Thread(target=worker) for _ in range(3)]
for t in threads: t.start()
for i in range(200): work.put(i)
for t in threads: work.put(None)
for t in threads: t.join()
print(sum(done), len(done))
server = socket.create_server(("127.0.0.1", 0))
def echo():
    peer, _ = server.accept()
    with peer:
        while part := peer.recv(1000):
            peer.sendall(part.upper())
threading.Thread(target=echo).start()
with socket.create_connection(server.getsockname()) as client:
    client.sendall(b"hello " * 1000)
    client.shutdown(socket.SHUT_WR)
    got = b"".join(iter(lambda: client.recv(4096), b""))
print(len(got), got[:11])
print(subprocess.run(["sort", "-r"], input=b"b\na\nc\n", capture_output=True).stdout)
read, write = os.pipe()
if (pid := os.fork()) == 0:
    os.write(write, b"child")
    os._exit(3)
print(os.read(read, 10), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
with open(f"/tmp/{sys.argv[1]}", "w+b") as file:
    file.write(struct.pack("<100d", *range(100)))
    file.seek(792)
    print(struct.unpack("<d", file.read(8)))
sys.exit(5)
"""

_PERL = r"""
my %count; $count{$_ % 7}++ for 1..2000; print join(",", map { "$_=$count{$_}" } sort keys %count), "\n";
my $text = join " ", map { sprintf "%x", $_ * 7919 } 1..200;
my @found = $text =~ /([a-f]\d+)/g; print scalar(@found), "\n";
open my $pipe, "-|", "echo from a child" or die; print <$pipe>; close $pipe; print "$?\n";
if (my $pid = fork) { waitpid $pid, 0; print $? >> 8, "\n" } else { exit 9 }
"""

_SQL = r"""
db=/tmp/$0.db
sqlite3 $db "create table t(a integer primary key, b text); create index i on t(b)"
sqlite3 $db "with recursive n(i) as (select 1 union all select i + 1 from n where i < 5000)
             insert into t select i, printf('%x', i * 2654435761 % 4294967296) from n"
sqlite3 $db "select count(*), min(b), max(b), sum(length(b)) from t; pragma integrity_check"
(echo "begin; update t set b = 'lost'; select 'begun';"; sleep 30) | sqlite3 $db > /tmp/$0.out &
until grep -q begun /tmp/$0.out; do sleep 0.05; done
kill -9 $!
sqlite3 -cmd ".timeout 20000" $db "
    pragma integrity_check; select count(*) from t where b = 'lost'; delete from t where a % 2; vacuum;
    select count(*), sum(a) from t"
"""

_REDIS = r"""
redis-server --port $1 --save "" --daemonize yes > /dev/null
until redis-cli -p $1 ping > /dev/null 2>&1; do sleep 0.1; done
redis-cli -p $1 set a 41; redis-cli -p $1 incr a; redis-cli -p $1 lpush l 1 2 3; redis-cli -p $1 lrange l 0 -1
redis-benchmark -p $1 -n 2000 -r 100 -P 16 -t set,lpush -q > /dev/null; redis-cli -p $1 llen mylist
redis-cli -p $1 eval 'local s = 0; for i = 1, 1000 do s = s + i end; return s' 0; redis-cli -p $1 shutdown nosave
"""


@pytest.fixture(scope="session")
def root() -> Path:
    return root_of("programs", "dash", "coreutils", "diffutils", "grep", "python3", "perl-base", "sqlite3",
                   "redis-server", "redis-tools", "sysbench")


@pytest.mark.parametrize("command", [
    pytest.param(["sh", "-c", _SHELL], id="shell"), pytest.param(["python3", "-c", _PYTHON], id="python"),
    pytest.param(["perl", "-e", _PERL], id="perl"), pytest.param(["sh", "-c", _SQL], id="sqlite"),
    pytest.param(["sh", "-c", _REDIS, "0", "17391"], id="redis")])
def test_as_natively(root: Path, tmp_path: Path, command: list[str]) -> None:
    if command[0] != "perl" and len(command) == 3:
        command = [*command, "one"]
    native = natively(root, *command)
    for name in (root / "tmp").iterdir():       # what it has left is not there for the other
        if name.is_dir():
            for each in name.iterdir():
                each.unlink()
            name.rmdir()
        else:
            name.unlink()
    ran = inside(root, tmp_path, *command, options=("--verify", "--memory", "384MiB", "--threads", "10"))
    assert ran.output.decode() == native.output.decode()
    assert ran.code == native.code
    assert ran.verification["ok"]
    assert not ran.verification["lost_pages"]
    assert ran.report["program"]["missing_calls"] == {}
