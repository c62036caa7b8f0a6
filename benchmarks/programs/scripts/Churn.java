/** Three threads that keep a few thousand arrays each and replace one after the other, for ever. */
public class Churn {
    public static void main(String[] arguments) throws InterruptedException {
        for (int seed = 0; seed < 3; seed++) {
            java.util.Random random = new java.util.Random(seed);
            new Thread(() -> {
                int[][] kept = new int[2000][];
                for (long i = 0; ; i++) {
                    int[] made = new int[200 + random.nextInt(2000)];
                    for (int at = 0; at < made.length; at += 50) made[at] = random.nextInt();
                    kept[random.nextInt(kept.length)] = made;
                }
            }).start();
        }
    }
}
