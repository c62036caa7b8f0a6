# The server, its benchmark and its client.
p=17391; cd /out
redis-server --port $p --save "" --enable-debug-command yes --daemonize yes > /dev/null
until redis-cli -p $p ping > /dev/null 2>&1; do sleep 0.1; done
redis-benchmark -p $p -n 5000 -r 1000 -P 16 -q -t set,get,incr,lpush,rpush,lpop,rpop,sadd,hset,spop,zadd,zpopmin,lrange_100,mset > /dev/null; echo benchmark $?
redis-benchmark -p $p -n 2000 -c 20 -r 100 -q -t ping_inline,ping_mbulk,set,get > /dev/null; echo benchmark $?
redis-cli -p $p flushall; redis-cli -p $p set a 41; redis-cli -p $p incr a; redis-cli -p $p lpush l 1 2 3; redis-cli -p $p lrange l 0 -1
seq 1 3000 | sed 's/.*/set key:& value-&/' | redis-cli -p $p > answers; sort answers | uniq -c; redis-cli -p $p dbsize
redis-cli -p $p eval 'local s = 0; for i = 1, 3000 do s = s + #redis.call("get", "key:" .. i) end; return s' 0
redis-cli -p $p zadd z 1 a 2 b 3 c; redis-cli -p $p zrange z 0 -1 withscores; redis-cli -p $p hset h f v g w; redis-cli -p $p hgetall h
redis-cli -p $p save; redis-cli -p $p bgrewriteaof > /dev/null; redis-cli -p $p debug digest; redis-cli -p $p config set save "" > /dev/null
redis-cli -p $p bgsave > /dev/null; until redis-cli -p $p info persistence | grep -q rdb_bgsave_in_progress:0; do sleep 0.05; done
redis-cli -p $p info persistence | grep -c last_bgsave_status:ok; redis-cli -p $p shutdown nosave
until ! redis-cli -p $p ping > /dev/null 2>&1; do sleep 0.05; done
redis-server --port $p --save "" --daemonize yes --dir /out > /dev/null; until redis-cli -p $p ping 2>&1 | grep -q PONG; do sleep 0.1; done
redis-cli -p $p dbsize; redis-cli -p $p get key:777; redis-cli -p $p shutdown nosave
