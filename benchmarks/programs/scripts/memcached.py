"""memcached -t 4, and four clients in threads."""
import socket
import subprocess
import threading
import time

PORT = 17392
server = subprocess.Popen(["memcached", "-u", "root", "-t", "4", "-p", str(PORT), "-U", "0", "-l", "127.0.0.1",
                           "-m", "64"])


def connected():
    while True:
        try:
            return socket.create_connection(("127.0.0.1", PORT))
        except ConnectionRefusedError:
            time.sleep(0.05)


def work(name, found):
    with connected() as there:
        answers = there.makefile("rb")
        right = 0
        for turn in range(20):
            keys = range(turn * 100, turn * 100 + 100)
            there.sendall(b"".join(b"set %s:%d 0 0 %d\r\n%08d%s\r\n" % (name, k, 8 + k % 500, k, b"x" * (k % 500))
                                   for k in keys))
            assert all(answers.readline() == b"STORED\r\n" for _ in keys)
            there.sendall(b"".join(b"get %s:%d\r\n" % (name, k) for k in keys))
            for k in keys:
                size = int(answers.readline().split()[3])
                right += answers.read(size + 2) == b"%08d" % k + b"x" * (k % 500) + b"\r\n"
                assert answers.readline() == b"END\r\n"
            there.sendall(b"incr n%s 1\r\nadd n%s 0 0 1\r\n5\r\n" % (name, name))
            answers.readline(), answers.readline()
        found[name] = right


found = {}
threads = [threading.Thread(target=work, args=(b"%d" % at, found)) for at in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
print(sorted(found.items()))
with connected() as there:
    there.sendall(b"stats\r\n")
    stats = dict(line.split()[1:3] for line in iter(there.makefile("rb").readline, b"END\r\n"))
print({name: stats[name] for name in (b"curr_items", b"cmd_get", b"cmd_set", b"get_hits", b"get_misses", b"threads")})
server.terminate()
print(server.wait())
