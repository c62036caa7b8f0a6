# 100,000 rows; killed in the middle of a transaction, and opened again.
cd /out; db=file.db
sqlite3 $db "create table t(a integer primary key, b text, c real); create index i on t(b)"
sqlite3 $db "with recursive n(i) as (select 1 union all select i + 1 from n where i < 100000)
             insert into t select i, printf('%x', i * 2654435761 % 4294967296), i / 7.0 from n"
sqlite3 $db "select count(*), min(b), max(b), sum(length(b)), round(total(c)) from t; pragma integrity_check"
(echo "begin; update t set b = 'lost' where a < 50000; select 'begun';"; sleep 60) | sqlite3 $db > begun &
until grep -q begun begun; do sleep 0.05; done
kill -9 $!; until sqlite3 $db "begin immediate; rollback" 2> /dev/null; do sleep 0.05; done
sqlite3 $db "pragma integrity_check; select count(*) from t where b = 'lost'; delete from t where a % 2; vacuum;
             select count(*), sum(a) from t; pragma journal_mode = wal; update t set c = c + 1; select round(total(c)) from t;
             select b from t order by b limit 5; pragma integrity_check"
sqlite3 $db .dump | sha256sum; sha256sum $db; rm -f begun; ls
pkill -P $$ sleep; exit 0
