/* Large products: out (+)= factor (a b + f z y). Included once for each REAL.

   After Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication": parts of a and b are laid out in
   the order in which they are read. b goes into panels of one vector's columns, (columns / LANES, depth, LANES), a into
   blocks of as many rows as have their sums in registers, (rows / TILE, depth, TILE). A step along the depth is one load
   of a panel and one multiplication by a broadcast number for each row. Numbers are added along the depth, in order,
   DEPTH at a time, whatever the number of threads. A product of low rank goes along as a few more steps of the depth: by
   itself it would read and write out once more. */

#define LANES ((long)(sizeof(VECTOR) / sizeof(REAL)))
#ifdef __AVX512F__
#define TILE 28
#define EACH_ROWS(DO) DO(4) DO(8) DO(12) DO(16) DO(20) DO(24) DO(28)
#define STEP 4
#else
#define TILE 6
#define EACH_ROWS(DO) DO(2) DO(4) DO(6)
#define STEP 2
#endif
#define DEPTH 576
#define GROUP 10 /* blocks of a that stay in the second cache while all panels pass */

/* m rows of a block, of which ``rows`` are wanted, times a panel, of which ``columns`` are; m is a constant where this is
   inlined. */
static inline __attribute__((always_inline)) void NAME(large_tile)(const REAL *a, const REAL *panel, REAL *out, long ldo,
                                                                   long depth, long rows, long columns, REAL factor,
                                                                   int add, const int m)
{
    VECTOR sums[TILE];
#pragma GCC unroll 28
    for (int i = 0; i < m; i++)
        sums[i] = (VECTOR){0};
    for (long k = 0; k < depth; k++, a += m, panel += LANES) {
        VECTOR w = *(const VECTOR *)panel;
#pragma GCC unroll 28
        for (int i = 0; i < m; i++)
            sums[i] += a[i] * w;
    }
    REAL found[TILE][LANES];
#pragma GCC unroll 28
    for (int i = 0; i < m; i++)
        *(VECTOR *)found[i] = sums[i];
    for (long i = 0; i < rows; i++) {
        REAL *to = out + i * ldo;
        if (columns == LANES) {
            VECTOR former = add ? *(VECTOR *)to : (VECTOR){0};
            *(VECTOR *)to = former + factor * *(VECTOR *)found[i];
        } else
            for (long c = 0; c < columns; c++)
                to[c] = (add ? to[c] : 0) + factor * found[i][c];
    }
}

/* Columns of a part of b as panels, of which the last is filled up with zeros: b (depth, columns), or where turned
   (columns, depth). */
static void NAME(lay_out_panel)(const REAL *b, long ldb, long turned, long depth, long columns, REAL *panel)
{
    if (columns < LANES)
        memset(panel, 0, (size_t)(depth * LANES) * sizeof *panel);
    if (!turned)
        for (long k = 0; k < depth; k++)
            memcpy(panel + k * LANES, b + k * ldb, (size_t)columns * sizeof *panel);
    else
        for (long k = 0; k < depth; k++)
            for (long c = 0; c < columns; c++)
                panel[k * LANES + c] = b[c * ldb + k];
}

/* Some rows of f a as a block of m rows, the last of which are zeros. */
static void NAME(lay_out_block)(const REAL *a, long lda, long depth, long rows, long m, REAL f, REAL *block)
{
    for (long k = 0; k < depth; k++)
        for (long i = 0; i < m; i++)
            block[k * m + i] = i < rows ? f * a[i * lda + k] : 0;
}

/* z (rows, rank), y (rank, columns), rank 0 where there are none. work: room for DEPTH + rank columns of a, its rows filled
   up to whole steps, and as much of b, filled up to whole panels. */
void NAME(large)(const REAL *a, long lda, const REAL *b, long ldb, long turned, REAL *out, long ldo, long rows,
                 long columns, long depth, double factor, long add, const REAL *z, long ldz, const REAL *y, long ldy,
                 long rank, double f, REAL *work, long threads)
{
    long blocks = (rows + TILE - 1) / TILE, panels = (columns + LANES - 1) / LANES;
    long cuts = (depth + DEPTH - 1) / DEPTH, filled = (rows + STEP - 1) / STEP * STEP;
#pragma omp parallel num_threads(threads)
    for (long cut = 0; cut < cuts; cut++) {
        long first = cut * depth / cuts, own = (cut + 1) * depth / cuts - first;
        long low = cut + 1 == cuts ? rank : 0, deep = own + low;
        REAL *of_b = work + filled * deep;
#pragma omp for schedule(static) nowait
        for (long i = 0; i < blocks; i++) {
            long begin = i * TILE, wanted = rows - begin < TILE ? rows - begin : TILE;
            long m = (wanted + STEP - 1) / STEP * STEP;
            NAME(lay_out_block)(a + begin * lda + first, lda, own, wanted, m, 1, work + begin * deep);
            NAME(lay_out_block)(z + begin * ldz, ldz, low, wanted, m, (REAL)f, work + begin * deep + own * m);
        }
#pragma omp for schedule(static)
        for (long p = 0; p < panels; p++) {
            long wanted = columns - p * LANES < LANES ? columns - p * LANES : LANES;
            const REAL *from = turned ? b + p * LANES * ldb + first : b + first * ldb + p * LANES;
            NAME(lay_out_panel)(from, ldb, turned, own, wanted, of_b + p * deep * LANES);
            NAME(lay_out_panel)(y + p * LANES, ldy, 0, low, wanted, of_b + (p * deep + own) * LANES);
        }
        long thread = omp_get_thread_num(), present = omp_get_num_threads();
        for (long group = 0; group < blocks; group += GROUP)
            for (long p = thread * panels / present; p < (thread + 1) * panels / present; p++) {
                long wide = columns - p * LANES < LANES ? columns - p * LANES : LANES;
                for (long i = group; i < blocks && i < group + GROUP; i++) {
                    long begin = i * TILE, wanted = rows - begin < TILE ? rows - begin : TILE;
                    const REAL *block = work + begin * deep, *panel = of_b + p * deep * LANES;
                    switch ((wanted + STEP - 1) / STEP * STEP) {
#define DO(m) \
    case m: \
        NAME(large_tile)(block, panel, out + begin * ldo + p * LANES, ldo, deep, wanted, wide, (REAL)factor, \
                         add || cut, m); \
        break;
                        EACH_ROWS(DO)
#undef DO
                    }
                }
            }
#pragma omp barrier
    }
}

#undef LANES
#undef TILE
#undef EACH_ROWS
#undef STEP
#undef DEPTH
#undef GROUP
