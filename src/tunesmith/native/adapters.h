/* LoRA terms of rows that belong to different adapters: out += (x A') B', each row by its own A and B (Hu et al. 2021,
   arXiv:2106.09685; batched so by Chen et al. 2023, Punica, arXiv:2310.18547). B has alpha / r in it.

   Rows are sorted by adapter; those of one are a segment, and read each number of its A and B together. A (summed
   ranks, width) and B (rank, outputs) lie as they were loaded: nothing is copied when an adapter comes or goes. Layers
   on one input are a group: their A's lie one below the other, so that one pass over x shrinks for all of them, and
   each has its part of the group's columns.

   A shrunk number is 16 sums along the width, added at the end; an expanded one is one sum along the ranks. Neither
   depends on other rows, nor on the number of threads. */

#define PARTS 3 /* query, key and value are the most layers on one input */
#define RANKS 4 /* shrunk at a time: each a row of A, walked along together */
#if defined(__AVX512F__)
#define SHRUNK_ROWS 4 /* sums of so many rows and RANKS fit the registers */
#else
#define SHRUNK_ROWS 1
#endif

/* Numbers and addresses of 8 bytes each, as serving/grouped_lora.py writes them. */
typedef struct {
    const float *b;          /* (rank, columns) */
    long start, columns;     /* of the group's */
    long first, rank;        /* of the group's ranks */
} lora_part;

typedef struct {
    const float *a; /* (ranks, width); NULL: the adapter has nothing here */
    long ranks, parts;
    lora_part part[PARTS];
} lora_term;

typedef struct {
    long first, rows;
    const lora_term *terms; /* one for each group of the model */
} lora_segment;

/* Numbers that are no whole vector, and zeros. */
static inline void first_numbers(const float *from, long count, float_vector *v)
{
    *v = (float_vector){0};
    memcpy(v, from, (size_t)count * sizeof *from);
}

/* m rows of x times RANKS rows of A, while others are asked for; m is a constant where this is inlined. */
static inline __attribute__((always_inline)) void shrink_tile(
    const float *x, long ldx, const float *const *a, const float *const *next, float *shrunk, long lds, long width,
    const int m)
{
    float_vector sums[SHRUNK_ROWS][RANKS];
    long whole = width / 16 * 16;
    for (int i = 0; i < m; i++)
        for (int r = 0; r < RANKS; r++)
            sums[i][r] = (float_vector){0};
    for (long k = 0; k < whole; k += 16)
#pragma GCC unroll 4
        for (int r = 0; r < RANKS; r++) {
            float_vector weights = *(const float_vector *)(a[r] + k);
            __builtin_prefetch(next[r] + k);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++)
                sums[i][r] += *(const float_vector *)(x + i * ldx + k) * weights;
        }
    for (int r = 0; whole < width && r < RANKS; r++)
        for (int i = 0; i < m; i++) {
            float_vector numbers, weights;
            first_numbers(x + i * ldx + whole, width - whole, &numbers);
            first_numbers(a[r] + whole, width - whole, &weights);
            sums[i][r] += numbers * weights;
        }
    for (int i = 0; i < m; i++)
        *(quad *)(shrunk + i * lds) = sums_of(sums[i]);
}

/* Some ranks of one segment. */
typedef struct {
    const float *a[RANKS];
    long first, rows, rank;
} shrink_task;

static void shrink_rows(const shrink_task *task, const shrink_task *next, const float *x, long ldx, float *shrunk,
                        long lds, long width)
{
    const float *from = x + task->first * ldx;
    float *to = shrunk + task->first * lds + task->rank;
    long i = 0;
    for (; i + SHRUNK_ROWS <= task->rows; i += SHRUNK_ROWS)
        shrink_tile(from + i * ldx, ldx, task->a, next->a, to + i * lds, lds, width, SHRUNK_ROWS);
    for (; i + 2 <= task->rows && SHRUNK_ROWS > 2; i += 2)
        shrink_tile(from + i * ldx, ldx, task->a, next->a, to + i * lds, lds, width, 2 < SHRUNK_ROWS ? 2 : 1);
    for (; i < task->rows; i++)
        shrink_tile(from + i * ldx, ldx, task->a, next->a, to + i * lds, lds, width, 1);
}

/* This thread's share of x A' for every segment, into shrunk (rows, lds): lds is a multiple of RANKS. A task is done when
   the next one is known, whose A's are short stretches of memory that no processor foresees. */
static void shrink_share(const lora_segment *segments, long count, long group, const float *x, long ldx, float *shrunk,
                         long lds, long width, long thread, long present)
{
    long number = 0;
    shrink_task task = {.rows = 0}, next;
    for (long s = 0; s < count; s++) {
        const lora_term *term = segments[s].terms + group;
        for (long r = 0; term->a && r < term->ranks; r += RANKS, number++) {
            if (number % present != thread)
                continue;
            for (long j = 0; j < RANKS; j++) /* the last is read again where there are no more */
                next.a[j] = term->a + (r + j < term->ranks ? r + j : term->ranks - 1) * width;
            next.first = segments[s].first, next.rows = segments[s].rows, next.rank = r;
            shrink_rows(&task, &next, x, ldx, shrunk, lds, width);
            task = next;
        }
    }
    shrink_rows(&task, &task, x, ldx, shrunk, lds, width);
}

/* Add shrunk B' to panel p, 16 columns, of out (rows, columns). */
static void expand_panel(const lora_segment *segments, long count, long group, const float *shrunk, long lds, float *out,
                         long ldo, long p)
{
    for (long s = 0; s < count; s++) {
        const lora_term *term = segments[s].terms + group;
        for (long n = 0; term->a && n < term->parts; n++) {
            const lora_part *part = term->part + n;
            long begin = p * PANEL > part->start ? p * PANEL : part->start, end = part->start + part->columns;
            end = (p + 1) * PANEL < end ? (p + 1) * PANEL : end;
            if (begin >= end)
                continue;
            const float *b = part->b + begin - part->start;
            for (long r = 0; r < part->rank; r++) /* of the next panel */
                __builtin_prefetch(b + r * part->columns + PANEL, 0, 2);
            for (long i = segments[s].first; i < segments[s].first + segments[s].rows; i++) {
                const float *factors = shrunk + i * lds + part->first;
                float *to = out + i * ldo + begin;
                float_vector sum, weights;
                if (end - begin == PANEL) {
                    sum = *(float_vector *)to;
                    for (long r = 0; r < part->rank; r++)
                        sum += factors[r] * *(const float_vector *)(b + r * part->columns);
                } else {
                    first_numbers(to, end - begin, &sum);
                    for (long r = 0; r < part->rank; r++) {
                        first_numbers(b + r * part->columns, end - begin, &weights);
                        sum += factors[r] * weights;
                    }
                }
                memcpy(to, &sum, (size_t)(end - begin) * sizeof *to);
            }
        }
    }
}

/* out (rows, columns) += the adapters' terms of a group for x (rows, width). */
void add_adapters_float(const float *x, long ldx, const lora_segment *segments, long count, long group, float *shrunk,
                        long lds, float *out, long ldo, long width, long columns, long threads)
{
#pragma omp parallel num_threads(threads)
    {
        shrink_share(segments, count, group, x, ldx, shrunk, lds, width, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
#pragma omp for schedule(guided)
        for (long p = 0; p < (columns + PANEL - 1) / PANEL; p++)
            expand_panel(segments, count, group, shrunk, lds, out, ldo, p);
    }
}
