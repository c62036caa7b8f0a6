# Applets of busybox, each with what it prints; /out is compared at the end.
PATH=/tmp/applets; export PATH
/bin/busybox mkdir /tmp/applets; /bin/busybox --install -s /tmp/applets
cd /out; umask 022
seq 1 5000 > numbers; yes 'a line of text' | head -2000 > text
echo "== text"; for each in "md5sum" "sha1sum" "sha256sum" "sha512sum" "sha3sum" "crc32" "cksum" "sum" "wc" "head -3" "tail -3" "nl" \
    "rev" "tac" "fold -w 7" "expand" "unexpand" "od -c" "hexdump -C" "xxd" "strings" "base64" "uuencode -m x" "sort -rn" "uniq -c" \
    "cut -c2-3" "shuf -n 0" "cat -n" "ts x" "tr 0-9 a-j" "sed s/1/one/g" "grep -c 7" "egrep -c (1|2)3" "fgrep -c 99" "awk {s+=\$1}END{print(s)}" \
    "paste - - -" "split -l 1000 - part." "dd bs=1000 count=3 skip=1" "factor" "tee copied" "ascii" "unix2dos" "dos2unix"; do
    echo "-- $each"; $each < numbers 2>&1 | md5sum; done
echo "== packing"; for each in gzip bzip2 lzop; do $each -c numbers > n.$each; $each -dc n.$each | cmp - numbers && echo $each; done
tar -czf all.tgz numbers text; tar -tzf all.tgz; mkdir un; tar -xzf all.tgz -C un; cmp un/text text && echo tar
ls numbers text | cpio -o -H newc 2> /dev/null | (mkdir cp; cd cp; cpio -i 2> /dev/null; ls)
zcat n.gzip | md5sum; bzcat n.bzip2 | md5sum; rm n.* all.tgz
echo "== files"; mkdir -p d/e/f; touch d/e/f/g; ln -s g d/e/f/h; ln numbers d/hard; mkfifo fifo; cp -a d d2; mv d2 d3; readlink d3/e/f/h
realpath d/e/../e; find d d3 | sort; ls -l d/e/f | awk '{ print $1, $2, $3, $4 }'; stat -c '%s %a %h' numbers; du -a d/e | sort; rmdir d3/e 2>&1
chmod 640 text; chown 12:34 text; stat -c '%a %u %g' text; truncate -s 100 text; wc -c text; fallocate -l 8192 big; stat -c %s big
diff numbers numbers && echo same; (sed 5d numbers; echo more) > other; diff numbers other; diff -u numbers other | tail -n +3 > change
patch numbers < change; cmp numbers other && echo patched; touch -d "2020-01-02 03:04:05" old; stat -c %y old; date -u -r old; basename a/b.c .c
dirname a/b/c; test -d d && [ -f old ] && [[ -L d/e/f/h ]] && echo tests; which ls; unlink old; rm -r d3; mktemp -u XXXXXX | wc -c; sync
setpriv true 2> /dev/null; run-parts d; shred -n 1 -u big
echo "== numbers"; expr 6 \* 7; bc <<X
2^100
X
dc -e '3 4 * p'; printf '%05d %x %s\n' 42 255 text; seq -w 8 11; factor 1234567890; cal 2 2024; usleep 1000; sleep 0.01; echo $((1 << 40)) $((7 % 3))
echo "== processes"; sleep 100 & kill $!; wait $!; echo $?; (exit 3); echo $?; timeout 0.1 sleep 5; echo $?; setsid echo session
env -i A=1 env; echo a b c | xargs -n 1 echo; seq 100 | xargs -n 30 | wc -l; trap 'echo trapped' USR1; kill -USR1 $$; pidof nobody; whoami; id; logname 2> /dev/null
(echo one; sleep 0.1; echo two) > fifo & cat fifo; time -f x true; seq 3 | while read n; do echo $n; done; ps > /dev/null; true; false; echo $?
start-stop-daemon -S -x /tmp/applets/true; watch -n 1 true 2> /dev/null & kill $!; tty; stty 2>&1 | head -1; nproc > /dev/null; uptime > /dev/null; free > /dev/null
echo "== shell"; f() { local a=$1; [ $a -le 1 ] && echo 1 && return; echo $((a * $(f $((a - 1))))); }; f 8; set -- x y z; echo $# $2 "$*"; shift; echo $1
case abc in a*) echo case;; esac; for i in 1 2 3; do [ $i = 2 ] && continue; echo $i; done; until false; do break; done; cat <<X
here $((1 + 1)) $(echo nested `echo deep`)
X
x=path/to/file.txt; echo ${x##*/} ${x%.*} ${#x} ${y:-unset} ${x/path/PATH}; (cd /; pwd); pwd; eval 'echo eval'; exec 3> third; echo three >&3; exec 3>&-
cat third; read a b <<X
first second third
X
echo $b; printf 'a\0b\0' | xargs -0 -n 1; echo abc | { read x; echo $x; }; ! true; echo $?; a=1; (a=2); echo $a; umask; ulimit -n > /dev/null; type cd
rm -f lock; i=0; while [ $i -lt 300 ]; do i=$((i + 1)); done; echo $i; for i in $(seq 30); do /tmp/applets/true; done; echo loop; vi -h 2>&1 | head -0
echo "== network"; (echo hello | nc -l -p 17311 > got) & until nc 127.0.0.1 17311 < text > sent; do sleep 0.05; done; wait; cat sent; cmp got text && echo nc
echo "<b>page</b>" > index.html; httpd -p 17312 -h /out; wget -q -O page http://127.0.0.1:17312/index.html; cat page; ipcalc -b 10.1.2.3/24
hostid | wc -c; cat /proc/self/comm; rm -f fifo lock; cp /out/numbers /out/last
echo "== files at the end"; find . -type f | sort | xargs sha256sum; find . -exec stat -c '%n %F %a' '{}' ';' | sort
