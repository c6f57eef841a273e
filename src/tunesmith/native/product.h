/* out = x W' for few rows of x, as they come when tokens are made, with W laid out once.

   W (columns, width) lies in panels of 16 columns, (columns / 16, width, 16), the last filled up with zeros: a panel is
   read strictly forward. x is laid out as (width, rows) in blocks of as many rows as have their sums in registers, so
   that a step along the width is one load of 16 weights and one multiplication by a broadcast number for each row. With
   16 rows on AVX-512 that takes 16 cycles for 64 bytes, about what memory gives; weights are asked for ahead of their
   use, so reading and computing overlap. More rows are several blocks, which find the panel in the cache.

   A number of the result is one sum along the width, in order, whatever the number of rows and threads: what a row gets
   does not depend on the rows it is computed with. */

#define PANEL 16
#define AHEAD 64 /* steps; 4 KB are on their way, to the second cache */

/* A vector, how many make a panel's columns, and how many rows have sums in registers, beside weights and a number. */
#if defined(__AVX512F__)
#define BYTES 64
#define MOST_ROWS 28
#define EACH_ROWS(DO) \
    DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) \
    DO(18) DO(19) DO(20) DO(21) DO(22) DO(23) DO(24) DO(25) DO(26) DO(27) DO(28)
#else
#if defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#if defined(__AVX__) || defined(__aarch64__)
#define MOST_ROWS 6
#define EACH_ROWS(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#else
#define MOST_ROWS 3
#define EACH_ROWS(DO) DO(1) DO(2) DO(3)
#endif
#endif
#define VECTORS (PANEL * 4 / BYTES)

typedef float lanes __attribute__((vector_size(BYTES), aligned(4), may_alias));

/* Found numbers to where they belong. Whole panels in vectors: a tenth of a product's time with loops of any length. */
static __attribute__((noinline)) void put_tile(float (*found)[PANEL], const float *bias, float *out, long ldo, long rows,
                                               long columns, long add)
{
    static const float none[PANEL];
    if (columns < PANEL) {
        for (long i = 0; i < rows; i++)
            for (long c = 0; c < columns; c++)
                out[i * ldo + c] = (add ? out[i * ldo + c] : 0) + found[i][c] + (bias ? bias[c] : 0);
        return;
    }
    const lanes *more = (const lanes *)(bias ? bias : none);
    for (long i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (long v = 0; v < VECTORS; v++) {
            lanes *to = (lanes *)(out + i * ldo) + v, sum = ((lanes *)found[i])[v];
            if (add)
                sum = *to + sum;
            *to = sum + more[v];
        }
}

/* m rows times a panel, of which ``columns`` are wanted. x (width, m); m is a constant where this is inlined. */
static inline __attribute__((always_inline)) void product_tile(
    const float *x, const float *panel, const float *bias, float *out, long ldo, long width, long columns, long add,
    const int m)
{
    lanes sums[MOST_ROWS][VECTORS];
#pragma GCC unroll 28
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[i][v] = (lanes){0};
    for (long k = 0; k < width; k++, x += m, panel += PANEL) {
        lanes weights[VECTORS];
        __builtin_prefetch(panel + AHEAD * PANEL, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            weights[v] = ((const lanes *)panel)[v];
#pragma GCC unroll 28
        for (int i = 0; i < m; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[i][v] += x[i] * weights[v];
    }
    /* By way of memory: unrolled once more for each count of rows, this would take a compiler a minute. */
    float found[MOST_ROWS][PANEL];
#pragma GCC unroll 28
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            ((lanes *)found[i])[v] = sums[i][v];
    put_tile(found, bias, out, ldo, m, columns, add);
}

/* The first row of block b of so many. */
static inline long block_start(long b, long blocks, long rows) { return b * rows / blocks; }

/* Columns begin to end of a block of rows of x as (width, rows), by squares of four. */
static void lay_out_rows(const float *x, long ldx, float *laid, long rows, long begin, long end)
{
    for (long k = begin; k < end; k += 4)
        for (long i = 0; i < rows; i += 4) {
            const float *from = x + i * ldx + k;
            float *to = laid + k * rows + i;
            if (k + 4 <= end && i + 4 <= rows) {
                quad a = *(const quad *)from, b = *(const quad *)(from + ldx);
                quad c = *(const quad *)(from + 2 * ldx), d = *(const quad *)(from + 3 * ldx);
                quad ab = PICK(a, b, 0, 4, 1, 5), cd = PICK(c, d, 0, 4, 1, 5);
                quad last_ab = PICK(a, b, 2, 6, 3, 7), last_cd = PICK(c, d, 2, 6, 3, 7);
                *(quad *)to = PICK(ab, cd, 0, 1, 4, 5);
                *(quad *)(to + rows) = PICK(ab, cd, 2, 3, 6, 7);
                *(quad *)(to + 2 * rows) = PICK(last_ab, last_cd, 0, 1, 4, 5);
                *(quad *)(to + 3 * rows) = PICK(last_ab, last_cd, 2, 3, 6, 7);
            } else
                for (long j = 0; j < 4 && k + j < end; j++)
                    for (long n = 0; n < 4 && i + n < rows; n++)
                        to[j * rows + n] = from[n * ldx + j];
        }
}

static inline long row_blocks(long rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }

/* Panel p of the result, all blocks of rows. */
static __attribute__((noinline)) void product_panel(
    const float *laid, const float *panels, const float *bias, float *out, long ldo, long rows, long width, long columns,
    long add, long p)
{
    const float *panel = panels + p * width * PANEL, *c = bias ? bias + p * PANEL : NULL;
    long wanted = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL, blocks = row_blocks(rows);
    for (long b = 0; b < blocks; b++) {
        long first = block_start(b, blocks, rows);
        const float *block = laid + first * width;
        float *to = out + first * ldo + p * PANEL;
        switch (block_start(b + 1, blocks, rows) - first) {
#define TILE(m) \
    case m: \
        product_tile(block, panel, c, to, ldo, width, wanted, add, m); \
        break;
            EACH_ROWS(TILE)
#undef TILE
        }
    }
}

/* out (rows, columns) (+)= x W' + bias. laid: room for x once more; bias may be NULL. */
void product_float(const float *x, long ldx, const float *panels, const float *bias, float *out, long ldo, float *laid,
                   long rows, long width, long columns, long add, long threads)
{
    long blocks = row_blocks(rows), count = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1)
    for (long b = 0; b < blocks; b++) {
        long first = block_start(b, blocks, rows), end = block_start(b + 1, blocks, rows);
        lay_out_rows(x + first * ldx, ldx, laid + first * width, end - first, 0, width);
    }
    /* Threads share the machine with others: who is late gets less. */
#pragma omp parallel for schedule(guided) num_threads(threads)
    for (long p = 0; p < count; p++)
        product_panel(laid, panels, bias, out, ldo, rows, width, columns, add, p);
}

/* W (columns, width) laid out. */
void lay_out_panels_float(const float *w, long ldw, float *panels, long columns, long width, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < (columns + PANEL - 1) / PANEL; p++) {
        float *panel = panels + p * width * PANEL;
        long wanted = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL;
        memset(panel, 0, (size_t)(wanted < PANEL ? width * PANEL : 0) * sizeof *panel);
        for (long k = 0; k < width; k++)
            for (long c = 0; c < wanted; c++)
                panel[k * PANEL + c] = w[(p * PANEL + c) * ldw + k];
    }
}
