/* Attention of one new token of a request over the request's cached tokens: some groups of query heads, each with a key.

   A token of the cache has its keys and then its values, (2, groups, size); tokens lie ``stride`` apart. Scores are
   kept for all tokens that are seen, then the softmax is taken, then values are summed. Four keys' products are summed
   at a time, by vectors. Memory is the bound, so it is asked for ahead: of a short request keys and values by the way
   of the scores, and the next request's by the way of the values. A head's numbers depend on its own request alone. */

#define KEYS 16 /* tokens of a block; those of the next are on their way */
/* Heads whose sums are in registers together, so that a key or value is loaded once for them. */
#if defined(__AVX512F__)
#define HEADS 4
#define EACH_HEADS(DO) DO(1) DO(2) DO(3) DO(4)
#else
#define HEADS 1
#define EACH_HEADS(DO) DO(1)
#endif

#define SHORT (1 << 17) /* numbers of a request, keys and values, that stay in the second cache until its values' turn */

/* Queries, sums and a block of padded keys or values; scores. ``most``: tokens that a request can have. */
#define WHOLE(n) (((n) + 15) / 16 * 16)
#define ATTENTION_SHARE(heads, size, most) ((2 * (heads) + KEYS) * WHOLE(size) + (heads) * WHOLE(most))

/* a' = a c1 - b s1, b' = b c2 + a s2 of the two halves of a head: see models/kernels/rotary.py. */
static void rotate_head(const float *from, float *to, const float *cos, const float *sin, long size, float factor)
{
    long half = size / 2;
#pragma omp simd
    for (long j = 0; j < half; j++) {
        float a = from[j], b = from[half + j];
        to[j] = (a * cos[j] - b * sin[j]) * factor;
        to[half + j] = (b * cos[half + j] + a * sin[half + j]) * factor;
    }
}

/* Keys or values of a block, (tokens, padded): where they lie, or copied with zeros where a head is no whole vectors. */
static const float *padded_block(const float *from, long stride, long tokens, long size, float *room, long *found)
{
    *found = stride;
    if (size % 16 == 0)
        return from;
    long padded = *found = WHOLE(size);
    for (long t = 0; t < tokens; t++) {
        memcpy(room + t * padded, from + t * stride, (size_t)size * sizeof *room);
        memset(room + t * padded + size, 0, (size_t)(padded - size) * sizeof *room);
    }
    return room;
}

/* Ask for count numbers of each of some tokens: the keys of some groups, or their values. */
static void ask_for(const float *from, long stride, long tokens, long count)
{
    for (long t = 0; t < tokens; t++)
        for (long j = 0; j < count; j += 16)
            __builtin_prefetch(from + t * stride + j, 0, 2);
}

/* Scores of some heads with the tokens of a block. heads is a constant where this is inlined. */
static inline __attribute__((always_inline)) void score_block(
    const float *queries, long padded, const float *keys, long stride, long tokens, float *scores, long step,
    const int heads)
{
    for (long t = 0; t < tokens; t += 4) {
        float_vector sums[HEADS][4] = {{{0}}};
        const float *key[4];
        for (long i = 0; i < 4; i++) /* the last is read again where there are no more */
            key[i] = keys + (t + i < tokens ? t + i : tokens - 1) * stride;
        for (long j = 0; j < padded; j += 16)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                float_vector of_key = *(const float_vector *)(key[i] + j);
#pragma GCC unroll 4
                for (int e = 0; e < heads; e++)
                    sums[e][i] += *(const float_vector *)(queries + e * padded + j) * of_key;
            }
        for (int e = 0; e < heads; e++)
            *(quad *)(scores + e * step + t) = sums_of(sums[e]);
    }
}

/* sums += weights times some vectors of the values of a block, for some heads; both are constants when inlined. */
static inline __attribute__((always_inline)) void sum_vectors(
    const float *weights, long step, const float *values, long stride, long tokens, float *sums, long padded,
    const int heads, const int vectors)
{
    float_vector kept[HEADS][4];
#pragma GCC unroll 4
    for (int e = 0; e < heads; e++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            kept[e][v] = *(float_vector *)(sums + e * padded + 16 * v);
    for (long t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float_vector value = *(const float_vector *)(values + t * stride + 16 * v);
#pragma GCC unroll 4
            for (int e = 0; e < heads; e++)
                kept[e][v] += weights[e * step + t] * value;
        }
#pragma GCC unroll 4
    for (int e = 0; e < heads; e++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            *(float_vector *)(sums + e * padded + 16 * v) = kept[e][v];
}

static inline __attribute__((always_inline)) void sum_block(
    const float *weights, long step, const float *values, long stride, long tokens, float *sums, long padded,
    const int heads)
{
    long j = 0;
    for (; j + 64 <= padded; j += 64)
        sum_vectors(weights, step, values + j, stride, tokens, sums + j, padded, heads, 4);
    for (; j < padded; j += 16)
        sum_vectors(weights, step, values + j, stride, tokens, sums + j, padded, heads, 1);
}

/* Scores become e^(s - the greatest); returns their sum, by which the values' sum is divided at the end. */
static float exponentials(float *scores, long count)
{
    float top = scores[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (long t = 0; t < count; t++)
        top = scores[t] > top ? scores[t] : top;
#pragma omp simd reduction(+ : sum)
    for (long t = 0; t < count; t++) {
        scores[t] = exp_float(scores[t] - top);
        sum += scores[t];
    }
    return sum;
}

/* out (groups * each, size) of token number ``last`` of a request, whose query (groups * each, size) is not rotated yet.

   cache: the first group's key of the request's token 0; the values lie ``to_value`` behind their keys. Token ``first``
   is the first that is seen. next: the first key that the thread will see after this, or NULL; as many tokens of it are
   asked for. room: ATTENTION_SHARE numbers. */
static void attend_next(const float *query, const float *cache, long stride, long to_value, long first, long last,
                        long groups, long each, long size, long most, const float *cos, const float *sin, float scale,
                        const float *next, float *out, float *room)
{
    long heads = groups * each, padded = WHOLE(size), step = WHOLE(most), found;
    float *queries = room, *sums = queries + heads * padded, *block = sums + heads * padded;
    float *scores = block + KEYS * padded, all[heads];
    const int is_short = (last + 1 - first) * stride <= SHORT;
    memset(room, 0, (size_t)(2 * heads * padded) * sizeof *room);
    for (long h = 0; h < heads; h++)
        rotate_head(query + h * size, queries + h * padded, cos, sin, size, scale);
    for (long t = first; t <= last; t += KEYS) {
        long tokens = last + 1 - t < KEYS ? last + 1 - t : KEYS;
        for (long g = 0; g < groups; g++) {
            long begin = t + KEYS + KEYS * g / groups, end = t + KEYS + KEYS * (g + 1) / groups;
            long coming = (end < last ? end : last) - begin;
            ask_for(cache + begin * stride, stride, coming, groups * size);
            if (is_short)
                ask_for(cache + begin * stride + to_value, stride, coming, groups * size);
            const float *keys = padded_block(cache + t * stride + g * size, stride, tokens, size, block, &found);
            for (long h = g * each; h < (g + 1) * each; h += HEADS)
                switch ((g + 1) * each - h < HEADS ? (g + 1) * each - h : HEADS) {
#define SCORES(n) \
    case n: \
        score_block(queries + h * padded, padded, keys, found, tokens, scores + h * step + t - first, step, n); \
        break;
                    EACH_HEADS(SCORES)
#undef SCORES
                }
        }
    }
    for (long h = 0; h < heads; h++)
        all[h] = exponentials(scores + h * step, last + 1 - first);
    for (long t = first; t <= last; t += KEYS) {
        long tokens = last + 1 - t < KEYS ? last + 1 - t : KEYS;
        if (!is_short)
            ask_for(cache + (t + KEYS) * stride + to_value, stride, (t + 2 * KEYS < last ? KEYS : last - t - KEYS),
                    groups * size);
        else if (next && (t + KEYS - first) * stride <= SHORT) {
            ask_for(next + (t - first) * stride, stride, KEYS, groups * size);
            ask_for(next + (t - first) * stride + to_value, stride, KEYS, groups * size);
        }
        for (long g = 0; g < groups; g++) {
            const float *from = cache + to_value + t * stride + g * size;
            const float *values = padded_block(from, stride, tokens, size, block, &found);
            for (long h = g * each; h < (g + 1) * each; h += HEADS)
                switch ((g + 1) * each - h < HEADS ? (g + 1) * each - h : HEADS) {
#define SUMS(n) \
    case n: \
        sum_block(scores + h * step + t - first, step, values, found, tokens, sums + h * padded, padded, n); \
        break;
                    EACH_HEADS(SUMS)
#undef SUMS
                }
        }
    }
    for (long h = 0; h < heads; h++)
        for (long j = 0; j < size; j++)
            out[h * size + j] = sums[h * padded + j] / all[h];
}
