import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

/** Garbage, and what lives on: threads, maps, streams, exceptions, a null that is one. */
public class Collect {
    record Node(Node left, Node right, int key) {
        long sum() { return (left == null ? 0 : left.sum()) + key + (right == null ? 0 : right.sum()); }
    }

    static Node build(int depth) { return depth == 0 ? new Node(null, null, 1) : new Node(build(depth - 1), build(depth - 1), depth); }

    public static void main(String[] arguments) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        List<Future<Long>> found = new ArrayList<>();
        for (int i = 0; i < 60; i++) {
            final int n = i;
            found.add(pool.submit(() -> { long s = 0; for (int j = 0; j < 10; j++) s += build(11 + n % 4).sum(); return s; }));
        }
        long total = 0;
        for (Future<Long> each : found) total += each.get();
        System.out.println("trees " + total);
        ConcurrentHashMap<String, Integer> words = new ConcurrentHashMap<>();
        for (int t = 0; t < 4; t++) found.set(t, pool.submit(() -> { for (int i = 0; i < 20000; i++) words.merge(Integer.toHexString(i * 7919 % 5003), 1, Integer::sum); return 0L; }));
        for (int t = 0; t < 4; t++) found.get(t).get();
        System.out.println(words.size() + " " + new TreeMap<>(words).hashCode() + " " + words.values().stream().mapToInt(x -> x).sum());
        Map<Integer, byte[]> kept = new HashMap<>();
        Random random = new Random(7);
        for (int i = 0; i < 20000; i++) { byte[] b = new byte[random.nextInt(4000)]; Arrays.fill(b, (byte) i); kept.put(random.nextInt(3000), b); }
        int wrong = 0;
        for (byte[] b : kept.values()) for (int i = 1; i < b.length; i++) if (b[i] != b[0]) wrong++;
        System.out.println("kept " + kept.size() + " wrong " + wrong);
        System.out.println(IntStream.range(0, 100000).parallel().filter(x -> x % 7 == 3).mapToLong(x -> x).sum());
        int caught = 0;
        for (int i = 0; i < 1000; i++) try { Node none = i % 2 == 0 ? null : new Node(null, null, i); caught += none.key() & 0; } catch (NullPointerException e) { caught++; }
        System.out.println("caught " + caught);
        try { recurse(0); } catch (StackOverflowError e) { System.out.println("overflow"); }
        try { List<long[]> much = new ArrayList<>(); while (true) much.add(new long[1 << 20]); } catch (OutOfMemoryError e) { System.out.println("no memory"); }
        pool.shutdown();
        System.out.println(pool.awaitTermination(60, TimeUnit.SECONDS));
        System.exit(6);
    }

    static int recurse(int n) { return recurse(n + 1) + 1; }
}
