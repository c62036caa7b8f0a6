# A program, compiled by "$@" in three files, and run.
cd /out
cat > part.h <<X
struct node { struct node *left, *right; long key; };
struct node *insert(struct node *, long); long sum(const struct node *); unsigned long hash(const char *, unsigned long);
X
cat > tree.c <<X
#include <stdlib.h>
#include "part.h"
struct node *insert(struct node *n, long key)
{
    if (!n) { n = calloc(1, sizeof *n); n->key = key; return n; }
    if (key < n->key) n->left = insert(n->left, key); else n->right = insert(n->right, key);
    return n;
}
long sum(const struct node *n) { return n ? sum(n->left) + n->key + sum(n->right) : 0; }
X
cat > hash.c <<X
#include "part.h"
unsigned long hash(const char *p, unsigned long n) { unsigned long h = 14695981039346656037UL; while (n--) h = (h ^ (unsigned char)*p++) * 1099511628211UL; return h; }
X
cat > main.c <<X
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "part.h"
int main(int argc, char **argv)
{
    struct node *root = 0; unsigned x = 12345; double s = 0;
    for (int i = 0; i < 50000; i++) { x = x * 1103515245u + 12345u; root = insert(root, x >> 8); s += sqrt(x & 1023); }
    printf("%ld %lx %.6f %d\n", sum(root), hash(argv[0], strlen(argv[0])), s, argc);
    return 3;
}
X
for each in tree hash main; do "$@" -c -o $each.o $each.c || exit 1; done
"$@" -o program tree.o hash.o main.o -lm || exit 1
./program a b; echo $?; "$@" -E -P main.c | sha256sum; echo 'int main() { return x; }' > wrong.c; "$@" -c wrong.c > said 2>&1; echo $?; cat said
sha256sum *.o program
