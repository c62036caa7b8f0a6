# coreutils (dynamic), under dash.
cd /out; umask 022
seq 1 20000 > n; for each in md5sum sha1sum sha224sum sha256sum sha384sum sha512sum b2sum cksum sum wc tac rev nl fold expand unexpand "od -x" base32 base64 \
    "basenc --z85" "sort -R --random-source=n" "sort -rn" "sort -S 100K" "uniq" "cut -c1-2" "head -c 1000" "tail -n 5" "tr 0-9 a-j" "fmt" "pr -l 20 -D x" \
    "numfmt --to=iec" "paste -d, - -" "split -n l/4 - s." "csplit -q - 100 200" "shuf --random-source=n" "factor" "comm - n" "join - n" "ptx" \
    "tee t1" "cat -A" "stdbuf -o0 cat" "dd bs=777 status=none" "tsort" "truncate -s 10 t1"; do echo "-- $each"; $each < n 2>&1 | md5sum; done
sort --parallel=4 -S 64K n | md5sum; mkdir -p a/b/c; touch -d '2020-02-02 UTC' a/b/c/d; cp -rp a z; mv z y; ln -s b a/l; ln n hard; ls -lR --time-style=+%s a y | grep -v total | sed 's/ [0-9]* \(a\|b\|c\|l\)/ \1/'
stat -c '%n %s %F %a %h' n a/b/c/d; du -ab --apparent-size n; readlink -f a/l/c; realpath --relative-to=a n; dircolors -b | md5sum; chmod -R g=u a; chown 1:2 a/b/c/d; stat -c '%a %u %g' a/b/c/d
install -D -m 711 n i/j/k; stat -c %a i/j/k; mkfifo p; (cat n > p &); wc -l < p; mknod q p; rm p q; rmdir --ignore-fail-on-non-empty i; mktemp -d -u XXXX | wc -c; unlink hard; ls
test n -nt a/b/c/d && echo newer; expr length hello; printf '%s %b %d\n' 'a b' '\101' 077; echo -e 'x\ty'; seq -f %03g 1 3; date -u -d @86400 +%F; env -u HOME printenv LC_ALL
nproc > /dev/null; timeout 0.2 sleep 9; echo $?; nohup true 2> /dev/null; nice -n 3 true; sync; logname 2> /dev/null; id -u; whoami; groups; users; tty; pwd -P; yes | head -3
(sleep 0.1; echo late) | cat; kill -l 9; sleep 5 & kill %1 2> /dev/null || kill $!; wait; pathchk n; arch; basename -s .c a/b.c; dirname /a/b; true; false; echo $?; shred -u -n 1 t1
mkdir links; for i in 1 2 3 4 5 6 7 8 9; do ln -s ../n links/$i; done; ls links | wc -l; cat links/* | md5sum; cp -L links/1 real; cmp real n; rm -rf links; df / > /dev/null; hostid > /dev/null
dd if=/dev/zero of=sparse bs=1M count=1 seek=9 status=none; stat -c %s sparse; cp --sparse=always sparse s2; cmp sparse s2; truncate -s 5 s2; find . -type f | sort | xargs sha256sum
