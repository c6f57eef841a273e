/* Attention of packed rows, forward and backward: see models/kernels/attention.py for the mathematics. Included once for
   each REAL. A segment is a run of tokens: the prefix that rows share, or a row's own tokens, which see the prefix and
   themselves. A task is a segment's heads that share a key. Its scores exist for some queries at a time and all keys
   those see, and are computed again in the backward pass (after Dao et al. 2022, arXiv:2205.14135). */

#define LANES ((long)(sizeof(VECTOR) / sizeof(REAL)))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define QUERIES 16 /* tokens of a block: their scores, for a few heads and hundreds of keys, fit the second cache */

/* A key's vector in the flat list of tokens: first those of the prefix, then the segment's own. */
static const REAL *NAME(key_token)(const REAL *qkv, long stride, long prefix, long start, long key)
{
    return qkv + (key < prefix ? key : start + key - prefix) * stride;
}

/* Keys or values as columns, (size, padded), padding 0. */
static void NAME(columns_of)(const REAL *qkv, long stride, long prefix, long start, long keys, long padded, long size,
                             REAL *out)
{
    for (long k = 0; k < keys; k++) {
        const REAL *from = NAME(key_token)(qkv, stride, prefix, start, k);
        for (long j = 0; j < size; j++)
            out[j * padded + k] = from[j];
    }
    for (long j = 0; j < size; j++)
        for (long k = keys; k < padded; k++)
            out[j * padded + k] = 0;
}

static void NAME(rows_of)(const REAL *qkv, long stride, long prefix, long start, long keys, long size, REAL *out)
{
    for (long k = 0; k < keys; k++)
        memcpy(out + k * size, NAME(key_token)(qkv, stride, prefix, start, k), (size_t)size * sizeof *out);
}

/* factor times some tokens' vectors of several heads, (heads, tokens, size). */
static void NAME(heads_of)(const REAL *from, long stride, long heads, long tokens, long size, REAL factor, REAL *out)
{
    for (long h = 0; h < heads; h++)
        for (long t = 0; t < tokens; t++)
            for (long j = 0; j < size; j++)
                out[(h * tokens + t) * size + j] = factor * from[t * stride + h * size + j];
}

static void NAME(put_heads)(const REAL *from, long stride, long heads, long tokens, long size, REAL *out)
{
    for (long h = 0; h < heads; h++)
        for (long t = 0; t < tokens; t++)
            memcpy(out + t * stride + h * size, from + (h * tokens + t) * size, (size_t)size * sizeof *out);
}

/* Softmax over the keys that a query sees, of which its own is key number own; the others get 0. */
static void NAME(softmax_row)(REAL *row, long own, long window, long width)
{
    long end = own + 1, begin = window && end > window ? end - window : 0;
    REAL top = row[begin], sum = 0;
#pragma omp simd reduction(max : top)
    for (long j = begin; j < end; j++)
        top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
    for (long j = begin; j < end; j++) {
        row[j] = EXP(row[j] - top);
        sum += row[j];
    }
    REAL factor = 1 / sum;
#pragma omp simd
    for (long j = begin; j < end; j++)
        row[j] *= factor;
    memset(row, 0, (size_t)begin * sizeof *row);
    memset(row + end, 0, (size_t)(width - end) * sizeof *row);
}

/* out from qkv. tasks[i] = segment * groups + group is computed by thread owners[i], which has share elements of
   workspace: as many as models/kernels/segments.py counts. */
void NAME(attend)(const REAL *qkv, REAL *out, const long *starts, const long *lengths, const long *tasks,
                  const long *owners, long count, long prefix, long heads, long groups, long size, long window,
                  double scale, REAL *workspace, long share, long threads)
{
    long each = heads / groups, stride = (heads + 2 * groups) * size, out_stride = heads * size;
#pragma omp parallel num_threads(threads)
    {
        long thread = omp_get_thread_num(), present = omp_get_num_threads();
        for (long i = 0; i < count; i++) {
            if (owners[i] % present != thread)
                continue;
            long segment = tasks[i] / groups, group = tasks[i] % groups, start = starts[segment];
            long before = segment == 0 ? 0 : prefix, length = lengths[segment], keys = before + length;
            long padded = PADDED(keys);
            REAL *columns = workspace + thread * share, *values = columns + size * padded;
            REAL *queries = values + keys * size, *outputs = queries + each * QUERIES * size;
            REAL *scores = outputs + each * QUERIES * size;
            NAME(columns_of)(qkv + (heads + group) * size, stride, before, start, keys, padded, size, columns);
            NAME(rows_of)(qkv + (heads + groups + group) * size, stride, before, start, keys, size, values);
            for (long begin = 0; begin < length; begin += QUERIES) {
                long tokens = begin + QUERIES < length ? QUERIES : length - begin, seen = before + begin + tokens;
                long width = PADDED(seen), rows = each * tokens, first = start + begin;
                NAME(heads_of)(qkv + first * stride + group * each * size, stride, each, tokens, size, (REAL)scale,
                               queries);
                NAME(expand_block)(queries, size, columns, padded, scores, width, rows, width, size, 1, 0);
                for (long r = 0; r < rows; r++)
                    NAME(softmax_row)(scores + r * width, before + begin + r % tokens, window, width);
                NAME(expand_block)(scores, width, values, size, outputs, size, rows, size, seen, 1, 0);
                NAME(put_heads)(outputs, out_stride, each, tokens, size, out + first * out_stride + group * each * size);
            }
        }
    }
}

/* dqkv from dout. The prefix's keys and values are seen by every segment: shared, (threads, 2, groups, prefix, size),
   takes each thread's sums, which are added in the order of threads. */
void NAME(attend_backward)(const REAL *dout, const REAL *qkv, REAL *dqkv, const long *starts, const long *lengths,
                           const long *tasks, const long *owners, long count, long prefix, long heads, long groups,
                           long size, long window, double scale, REAL *workspace, long share, REAL *shared, long threads)
{
    long each = heads / groups, stride = (heads + 2 * groups) * size, out_stride = heads * size;
    long of_prefix = groups * prefix * size;
#pragma omp parallel num_threads(threads)
    {
        long thread = omp_get_thread_num(), present = omp_get_num_threads();
        REAL *sums = shared + thread * 2 * of_prefix;
        memset(sums, 0, (size_t)(2 * of_prefix) * sizeof *sums);
        for (long i = 0; i < count; i++) {
            if (owners[i] % present != thread)
                continue;
            long segment = tasks[i] / groups, group = tasks[i] % groups, start = starts[segment];
            long before = segment == 0 ? 0 : prefix, length = lengths[segment], keys = before + length;
            long padded = PADDED(keys), most = each * QUERIES;
            REAL *key_columns = workspace + thread * share, *value_columns = key_columns + size * padded;
            REAL *key_rows = value_columns + size * padded, *dkeys = key_rows + keys * size;
            REAL *dvalues = dkeys + keys * size, *queries = dvalues + keys * size, *douts = queries + most * size;
            REAL *dqueries = douts + most * size, *scores = dqueries + most * size, *dscores = scores + most * padded;
            const REAL *key = qkv + (heads + group) * size, *value = key + groups * size;
            NAME(columns_of)(key, stride, before, start, keys, padded, size, key_columns);
            NAME(columns_of)(value, stride, before, start, keys, padded, size, value_columns);
            NAME(rows_of)(key, stride, before, start, keys, size, key_rows);
            memset(dkeys, 0, (size_t)(2 * keys * size) * sizeof *dkeys);
            for (long begin = 0; begin < length; begin += QUERIES) {
                long tokens = begin + QUERIES < length ? QUERIES : length - begin, seen = before + begin + tokens;
                long width = PADDED(seen), rows = each * tokens, first = start + begin, head = group * each * size;
                NAME(heads_of)(qkv + first * stride + head, stride, each, tokens, size, (REAL)scale, queries);
                NAME(heads_of)(dout + first * out_stride + head, out_stride, each, tokens, size, 1, douts);
                NAME(expand_block)(queries, size, key_columns, padded, scores, width, rows, width, size, 1, 0);
                NAME(expand_block)(douts, size, value_columns, padded, dscores, width, rows, width, size, 1, 0);
                for (long r = 0; r < rows; r++) {
                    REAL *p = scores + r * width, *d = dscores + r * width, sum = 0;
                    NAME(softmax_row)(p, before + begin + r % tokens, window, width);
#pragma omp simd reduction(+ : sum)
                    for (long j = 0; j < width; j++)
                        sum += p[j] * d[j];
#pragma omp simd
                    for (long j = 0; j < width; j++)
                        d[j] = p[j] * (d[j] - sum);
                }
                NAME(outer_block)(scores, width, douts, size, dvalues, size, rows, size, seen);
                NAME(outer_block)(dscores, width, queries, size, dkeys, size, rows, size, seen);
                NAME(expand_block)(dscores, width, key_rows, size, dqueries, size, rows, size, seen, (REAL)scale, 0);
                NAME(put_heads)(dqueries, stride, each, tokens, size, dqkv + first * stride + head);
            }
            /* A row's own keys get their gradients here, the prefix's below: of segment 0 all are the prefix's. */
            long common = segment == 0 ? length : before;
            if (segment == 0 && prefix == 0)
                common = 0;
            REAL *of_keys = sums + group * prefix * size, *of_values = of_keys + of_prefix;
            for (long j = 0; j < common * size; j++) {
                of_keys[j] += dkeys[j];
                of_values[j] += dvalues[j];
            }
            for (long k = common; k < keys; k++) {
                REAL *to = dqkv + (start + k - before) * stride + (heads + group) * size;
                memcpy(to, dkeys + k * size, (size_t)size * sizeof *to);
                memcpy(to + groups * size, dvalues + k * size, (size_t)size * sizeof *to);
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long k = 0; k < prefix; k++)
            for (long part = 0; part < 2 * groups; part++) {
                REAL *to = dqkv + k * stride + (heads + part) * size;
                for (long j = 0; j < size; j++) {
                    REAL sum = 0;
                    for (long t = 0; t < present; t++)
                        sum += shared[t * 2 * of_prefix + (part * prefix + k) * size + j];
                    to[j] = sum;
                }
            }
    }
}

#undef LANES
#undef PADDED
#undef QUERIES
