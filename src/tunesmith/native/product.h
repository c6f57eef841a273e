/* out = x W' for few rows of x, as they come when tokens are made, with W in the panels of panels.h.

   x is laid out as (width, rows) in blocks of as many rows as have their sums in registers, so that a step along the
   width is one load of 16 weights and one multiplication by a broadcast number for each row. With 16 rows on AVX-512
   that takes 16 cycles for 64 bytes, about what memory gives; weights are asked for ahead of their use, so reading and
   computing overlap. Weights of fewer bits become numbers on the way, in a few cycles for the 16 of a step; where there
   are many blocks of rows, once for all of them.

   A number of the result is one sum along the width, in order, whatever the number of rows and threads and the bits of
   the weights: what a row gets does not depend on the rows it is computed with. */

#define AHEAD 4096 /* bytes that are on their way, to the second cache */
#define UNPACKED 6 /* more blocks of rows read numbers sooner, which have to be written first, than codes of a few bits */

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

/* m rows times a panel, of which ``columns`` are wanted. x (width, m); m and bits are constants where this is inlined. */
static inline __attribute__((always_inline)) void product_tile(
    const float *x, const char *panel, const float *bias, float *out, long ldo, long width, long columns, long add,
    const int m, const int bits)
{
    lanes sums[MOST_ROWS][VECTORS], weights[VECTORS], steps[VECTORS] = {{0}}, offsets[VECTORS] = {{0}};
    words codes[VECTORS];
#pragma GCC unroll 28
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sums[i][v] = (lanes){0};
    for (long k = 0; k < width;) {
        if (bits < 16 && k % BLOCK == 0) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                steps[v] = ((const lanes *)panel)[v], offsets[v] = ((const lanes *)panel)[VECTORS + v];
            panel += 8 * PANEL;
        }
        __builtin_prefetch(panel + AHEAD, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            codes[v] = ((const words *)panel)[v];
        panel += 4 * PANEL;
#pragma GCC unroll 1
        for (int n = 0; n < 32 / bits; n++, k++, x += m) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                weights[v] = bits == 32 ? (lanes)codes[v] : numbers_of(codes[v], steps[v], offsets[v], bits);
                codes[v] = bits == 32 ? codes[v] : codes[v] >> (bits % 32);
            }
#pragma GCC unroll 28
            for (int i = 0; i < m; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sums[i][v] += x[i] * weights[v];
        }
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

/* A block of rows times a panel. bits is a constant where this is inlined. */
static inline __attribute__((always_inline)) void product_block(
    const float *block, const char *panel, const float *bias, float *to, long ldo, long width, long wanted, long add,
    long rows, const int bits)
{
    switch (rows) {
#define TILE(m) \
    case m: \
        product_tile(block, panel, bias, to, ldo, width, wanted, add, m, bits); \
        break;
        EACH_ROWS(TILE)
#undef TILE
    }
}

/* Panel p of the result, all blocks of rows. room: for a panel's numbers. */
static __attribute__((noinline)) void product_panel(
    const float *laid, const char *panels, long bits, const float *bias, float *out, long ldo, long rows, long width,
    long columns, long add, long p, float *room)
{
    const char *panel = panels + p * panel_bytes(width, bits);
    const float *c = bias ? bias + p * PANEL : NULL;
    long wanted = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL, blocks = row_blocks(rows);
    if (blocks > UNPACKED && bits < 16) {
        unpack_panel(panel, bits, width, room);
        panel = (const char *)room;
        bits = 32;
    }
    for (long b = 0; b < blocks; b++) {
        long first = block_start(b, blocks, rows), count = block_start(b + 1, blocks, rows) - first;
        const float *block = laid + first * width;
        float *to = out + first * ldo + p * PANEL;
        switch (bits) {
        case 32:
            product_block(block, panel, c, to, ldo, width, wanted, add, count, 32);
            break;
        case 16:
            product_block(block, panel, c, to, ldo, width, wanted, add, count, 16);
            break;
        case 8:
            product_block(block, panel, c, to, ldo, width, wanted, add, count, 8);
            break;
        default:
            product_block(block, panel, c, to, ldo, width, wanted, add, count, 4);
        }
    }
}

/* out (rows, columns) (+)= x W' + bias. room: for x once more, and for each thread a panel's numbers, (width, PANEL); bias
   may be NULL. */
void product_float(const float *x, long ldx, const char *panels, long bits, const float *bias, float *out, long ldo,
                   float *room, long rows, long width, long columns, long add, long threads)
{
    long blocks = row_blocks(rows), count = (columns + PANEL - 1) / PANEL;
    float *laid = room + threads * width * PANEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1)
    for (long b = 0; b < blocks; b++) {
        long first = block_start(b, blocks, rows), end = block_start(b + 1, blocks, rows);
        lay_out_rows(x + first * ldx, ldx, laid + first * width, end - first, 0, width);
    }
    /* Threads share the machine with others: who is late gets less. */
#pragma omp parallel for schedule(guided) num_threads(threads)
    for (long p = 0; p < count; p++)
        product_panel(laid, panels, bits, bias, out, ldo, rows, width, columns, add, p,
                      room + omp_get_thread_num() * width * PANEL);
}
