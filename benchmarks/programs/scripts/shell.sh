# For bash and zsh (as sh): what both have.
PATH=/tmp/applets; /bin/busybox mkdir /tmp/applets; /bin/busybox --install -s /tmp/applets; cd /out
f() { local n=$1; if (( n < 2 )); then echo $n; else echo $(( $(f $((n-1))) + $(f $((n-2))) )); fi; }
f 7
a=(one two three); a+=(four); echo "${a[@]}" "${#a[@]}"; for x in "${a[@]}"; do printf '%s,' "$x"; done; echo
x=file.tar.gz; echo "${x%%.*}" "${x#*.}" "${x/tar/zip}" "${#x}"; echo $((16#ff)) $((2**20)) $((7/2))
[[ abc == a* && 5 -gt 3 ]] && echo matched
echo {a,b}{1..3}; case $x in *.gz) echo gz;; esac; printf '%05d %s %x\n' 42 str 255 | tee printed
for i in {1..2000}; do echo $((i * i)); done > squares; s=0; while read -r n; do s=$((s + n)); done < squares; echo $s
read -r p q <<< "here string"; echo "$q"; cat <<X > doc
here $((1 + 1)) $x
X
while read -r line; do echo "$line"; done < doc; echo one | { read -r v; echo "$v"; }; (exit 7); echo $?
trap 'echo usr1' USR1; kill -USR1 $$; trap 'echo bye' EXIT; (sleep 0.05; exit 4) & wait $!; echo $?
for i in 1 2 3; do (sleep $((2 * i)); echo "done $i") & done; wait; set -- a b c; shift; echo "$1" $#; unset x; echo "${x:-none}"
mkdir -p d/e; : > d/e/f; for i in d/*/f; do echo "$i"; done; pushd d > /dev/null; pwd; popd > /dev/null; pwd; umask 077; : > private; [ -O private ] && echo mine
exec 5> fifth; echo five >&5; exec 5>&-; read -r v < fifth; echo "$v"; type cd > /dev/null && echo builtin; echo $(( (1 << 40) + 3 )); eval 'z=9'; echo $z
declare -A m; m[k]=v; m[l]=w; echo "${m[k]}${m[l]}"; i=0; until (( i >= 3 )); do ((i++)); done; echo $i; { echo out; echo err >&2; } 2>&1 | while read -r l; do echo "[$l]"; done
coproc_out=$(for i in {1..15}; do echo $i | { read -r y; echo $y; }; done | { s=0; while read -r y; do s=$((s+y)); done; echo $s; }); echo $coproc_out
for f in squares printed doc fifth; do n=0; while read -r line; do n=$((n+1)); done < $f; echo $f $n; done; sha256sum squares printed doc fifth
