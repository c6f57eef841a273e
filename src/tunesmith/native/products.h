/* Small products: those with the rank of an adapter, or of several stacked, and those of attention. Included once for
   each REAL. Libraries for matrix products pack their operands first, which costs more than such a product. */

#define LANES ((long)(sizeof(VECTOR) / sizeof(REAL)))
/* As many sums as there are registers for: 32 of 64 bytes with AVX-512, 16 of 32 bytes with AVX2. */
#ifdef __AVX512F__
#define TILE_ROWS 6
#define TILE_VECTORS 4
#else
#define TILE_ROWS 6
#define TILE_VECTORS 1
#endif

/* By halves: one number after the other would take as long as all multiplications of a tile. */
static inline REAL NAME(sum_of)(VECTOR v)
{
    typedef REAL half __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
    typedef REAL quarter __attribute__((vector_size(16), aligned(sizeof(REAL)), may_alias));
    half h = *(half *)&v + *((half *)&v + 1);
    quarter q = *(quarter *)&h + *((quarter *)&h + 1);
    REAL sum = q[0] + q[1];
    for (long l = 2; l < LANES / 4; l += 2)
        sum += q[l] + q[l + 1];
    return sum;
}

/* A tile of out = factor x a': m rows of x, r rows of a. m and r are constants where this is inlined. */
static inline __attribute__((always_inline)) void NAME(shrink_tile)(
    const REAL *x, long ldx, const REAL *a, long lda, REAL *out, long ldo, long width, REAL factor, const int m,
    const int r)
{
    VECTOR sums[m][r];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < r; j++)
            sums[i][j] = (VECTOR){0};
    long k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int i = 0; i < m; i++) {
            VECTOR v = *(const VECTOR *)(x + i * ldx + k);
            for (int j = 0; j < r; j++)
                sums[i][j] += v * *(const VECTOR *)(a + j * lda + k);
        }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < r; j++) {
            REAL sum = NAME(sum_of)(sums[i][j]);
            for (long l = k; l < width; l++)
                sum += x[i * ldx + l] * a[j * lda + l];
            out[i * ldo + j] = factor * sum;
        }
}

/* Rows begin to end of x, whose rows have width elements, as a contiguous matrix with zeros at the dropped places. */
static const REAL *NAME(dropped_rows)(const REAL *x, long ldx, const long *dropped, long count, long begin, long end,
                                      long width, REAL *to)
{
    for (long i = begin; i < end; i++)
        memcpy(to + (i - begin) * width, x + i * ldx, (size_t)width * sizeof *to);
    NAME(drop)(to - begin * width, dropped, count, begin * width, end * width);
    return to;
}

/* out (rows, rank) = factor x a'; x (rows, width), a (rank, width). Dropped places of x, numbered as if its rows stood
   together, count as 0. */
void NAME(shrink)(const REAL *x, long ldx, const REAL *a, REAL *out, long ldo, long rows, long width, long rank,
                  double factor, const long *dropped, long count, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i += 4) {
        long end = i + 4 < rows ? i + 4 : rows, ld = count ? width : ldx;
        REAL copy[count ? 4 * width : 1];
        const REAL *from =
            count ? NAME(dropped_rows)(x, ldx, dropped, count, i, end, width, copy) : x + i * ldx;
        if (i + 4 == end) {
            long j = 0;
            for (; j + 4 <= rank; j += 4)
                NAME(shrink_tile)(from, ld, a + j * width, width, out + i * ldo + j, ldo, width, (REAL)factor, 4, 4);
            for (; j < rank; j++)
                NAME(shrink_tile)(from, ld, a + j * width, width, out + i * ldo + j, ldo, width, (REAL)factor, 4, 1);
        } else
            for (long t = i; t < end; t++)
                for (long j = 0; j < rank; j++)
                    NAME(shrink_tile)(from + (t - i) * ld, ld, a + j * width, width, out + t * ldo + j, ldo, width,
                                      (REAL)factor, 1, 1);
    }
}

/* m rows of out (+)= factor z b for LANES * v columns. */
static inline __attribute__((always_inline)) void NAME(expand_tile)(
    const REAL *z, long ldz, const REAL *b, long ldb, REAL *out, long ldo, long rank, REAL factor, int add, const int m,
    const int v)
{
    VECTOR sums[m][v];
    for (int i = 0; i < m; i++)
        for (int c = 0; c < v; c++)
            sums[i][c] = (VECTOR){0};
    for (long j = 0; j < rank; j++)
        for (int c = 0; c < v; c++) {
            VECTOR w = *(const VECTOR *)(b + j * ldb + c * LANES);
            for (int i = 0; i < m; i++)
                sums[i][c] += z[i * ldz + j] * w;
        }
    for (int i = 0; i < m; i++)
        for (int c = 0; c < v; c++) {
            VECTOR *to = (VECTOR *)(out + i * ldo + c * LANES);
            *to = add ? *to + factor * sums[i][c] : factor * sums[i][c];
        }
}

static inline void NAME(expand_one)(const REAL *z, const REAL *b, long ldb, REAL *out, long rank, REAL factor, int add)
{
    REAL sum = 0;
    for (long j = 0; j < rank; j++)
        sum += z[j] * b[j * ldb];
    *out = add ? *out + factor * sum : factor * sum;
}

/* out (rows, width) (+)= factor z b by one thread; z (rows, rank), b (rank, width). */
static void NAME(expand_block)(const REAL *z, long ldz, const REAL *b, long ldb, REAL *out, long ldo, long rows,
                               long width, long rank, REAL factor, int add)
{
    for (long i = 0; i < rows; i += TILE_ROWS) {
        long m = i + TILE_ROWS <= rows ? TILE_ROWS : rows - i, k = 0;
        if (m == TILE_ROWS) {
            for (; k + TILE_VECTORS * LANES <= width; k += TILE_VECTORS * LANES)
                NAME(expand_tile)(z + i * ldz, ldz, b + k, ldb, out + i * ldo + k, ldo, rank, factor, add, TILE_ROWS,
                                  TILE_VECTORS);
            for (; k + LANES <= width; k += LANES)
                NAME(expand_tile)(z + i * ldz, ldz, b + k, ldb, out + i * ldo + k, ldo, rank, factor, add, TILE_ROWS,
                                  1);
        }
        for (long t = i; t < i + m; t++) {
            long c = k;
            for (; c + TILE_VECTORS * LANES <= width; c += TILE_VECTORS * LANES)
                NAME(expand_tile)(z + t * ldz, ldz, b + c, ldb, out + t * ldo + c, ldo, rank, factor, add, 1,
                                  TILE_VECTORS);
            for (; c + LANES <= width; c += LANES)
                NAME(expand_tile)(z + t * ldz, ldz, b + c, ldb, out + t * ldo + c, ldo, rank, factor, add, 1, 1);
            for (; c < width; c++)
                NAME(expand_one)(z + t * ldz, b + c, ldb, out + t * ldo + c, rank, factor, add);
        }
    }
}

/* The same by all threads, each some rows. Dropped places of out, where there are any and out is contiguous, become 0. */
void NAME(expand)(const REAL *z, long ldz, const REAL *b, REAL *out, long ldo, long rows, long width, long rank,
                  double factor, long add, const long *dropped, long count, long threads)
{
    const long block = 4 * TILE_ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i += block) {
        NAME(expand_block)(z + i * ldz, ldz, b, width, out + i * ldo, ldo, i + block < rows ? block : rows - i, width,
                           rank, (REAL)factor, (int)add);
        NAME(drop)(out, dropped, count, i * width, (i + block) * width);
    }
}

/* r rows of out += z' x over some rows, for LANES * v columns. */
static inline __attribute__((always_inline)) void NAME(outer_tile)(
    const REAL *z, long ldz, const REAL *x, long ldx, REAL *out, long ldo, long rows, const int r, const int v)
{
    VECTOR sums[r][v];
    for (int j = 0; j < r; j++)
        for (int c = 0; c < v; c++)
            sums[j][c] = *(const VECTOR *)(out + j * ldo + c * LANES);
    for (long i = 0; i < rows; i++)
        for (int c = 0; c < v; c++) {
            VECTOR w = *(const VECTOR *)(x + i * ldx + c * LANES);
            for (int j = 0; j < r; j++)
                sums[j][c] += z[i * ldz + j] * w;
        }
    for (int j = 0; j < r; j++)
        for (int c = 0; c < v; c++)
            *(VECTOR *)(out + j * ldo + c * LANES) = sums[j][c];
}

/* out (rank, width) += z' x by one thread; z (rows, rank), x (rows, width). */
static void NAME(outer_block)(const REAL *z, long ldz, const REAL *x, long ldx, REAL *out, long ldo, long rows,
                              long width, long rank)
{
    for (long j = 0; j < rank; j += TILE_ROWS) {
        long r = j + TILE_ROWS <= rank ? TILE_ROWS : rank - j, k = 0;
        if (r == TILE_ROWS) {
            for (; k + TILE_VECTORS * LANES <= width; k += TILE_VECTORS * LANES)
                NAME(outer_tile)(z + j, ldz, x + k, ldx, out + j * ldo + k, ldo, rows, TILE_ROWS, TILE_VECTORS);
            for (; k + LANES <= width; k += LANES)
                NAME(outer_tile)(z + j, ldz, x + k, ldx, out + j * ldo + k, ldo, rows, TILE_ROWS, 1);
        }
        for (long q = j; q < j + r; q++) {
            long c = k;
            for (; c + TILE_VECTORS * LANES <= width; c += TILE_VECTORS * LANES)
                NAME(outer_tile)(z + q, ldz, x + c, ldx, out + q * ldo + c, ldo, rows, 1, TILE_VECTORS);
            for (; c + LANES <= width; c += LANES)
                NAME(outer_tile)(z + q, ldz, x + c, ldx, out + q * ldo + c, ldo, rows, 1, 1);
            for (; c < width; c++)
                for (long i = 0; i < rows; i++)
                    out[q * ldo + c] += z[i * ldz + q] * x[i * ldx + c];
        }
    }
}

/* out (rank, width) = z' x by all threads, each some columns; rows go in blocks that stay in the nearest cache. */
void NAME(outer)(const REAL *z, long ldz, const REAL *x, long ldx, REAL *out, long rows, long width, long rank,
                 long threads)
{
    const long columns = TILE_VECTORS * LANES, block = 64;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long begin = 0; begin < width; begin += columns) {
        long count = begin + columns < width ? columns : width - begin;
        for (long j = 0; j < rank; j++)
            memset(out + j * width + begin, 0, (size_t)count * sizeof *out);
        for (long i = 0; i < rows; i += block)
            NAME(outer_block)(z + i * ldz, ldz, x + i * ldx + begin, ldx, out + begin, width,
                              i + block < rows ? block : rows - i, count, rank);
    }
}

#undef LANES
#undef TILE_ROWS
#undef TILE_VECTORS
