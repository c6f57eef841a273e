/* Attention of one new token of a request: its query heads that share a key, over the request's cached tokens.

   A token of the cache has its keys and then its values, (2, groups, size); tokens lie ``stride`` apart. Scores are
   kept for all tokens that are seen, then the softmax is taken, then values are summed: so memory is read once, forward,
   in blocks whose keys or values stay in the first cache for all heads. Four keys' products are summed at a time, by
   vectors. A head's numbers depend on its own request alone. */

#define KEYS 64 /* tokens of a block */

/* Queries, sums and a block of padded keys or values; scores. ``most``: tokens that a request can have. */
#define WHOLE(n) (((n) + 15) / 16 * 16)
#define ATTENTION_SHARE(each, size, most) ((2 * (each) + KEYS) * WHOLE(size) + (each) * WHOLE(most))

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

/* Scores of one head with the tokens of a block; vectors, of a head, is a constant where this is inlined. */
static inline __attribute__((always_inline)) void score_block(
    const float *query, const float *keys, long stride, long tokens, float *scores, const long vectors)
{
    for (long t = 0; t < tokens; t += 4) {
        float_vector sums[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const float *key = keys + (t + i < tokens ? t + i : tokens - 1) * stride;
            float_vector sum = *(const float_vector *)query * *(const float_vector *)key;
#pragma GCC unroll 8
            for (long v = 1; v < vectors; v++)
                sum += *(const float_vector *)(query + 16 * v) * *(const float_vector *)(key + 16 * v);
            sums[i] = sum;
        }
        *(quad *)(scores + t) = sums_of(sums);
    }
}

/* sums += weights times the values of a block. */
static inline __attribute__((always_inline)) void sum_block(
    const float *weights, const float *values, long stride, long tokens, float *sums, const long vectors)
{
    float_vector kept[8] = {{0}};
    for (long v0 = 0; v0 < vectors; v0 += 8) { /* as many as there are registers for */
        const long many = vectors - v0 < 8 ? vectors - v0 : 8;
#pragma GCC unroll 8
        for (long v = 0; v < many; v++)
            kept[v] = *(float_vector *)(sums + 16 * (v0 + v));
        for (long t = 0; t < tokens; t++)
#pragma GCC unroll 8
            for (long v = 0; v < many; v++)
                kept[v] += weights[t] * *(const float_vector *)(values + t * stride + 16 * (v0 + v));
#pragma GCC unroll 8
        for (long v = 0; v < many; v++)
            *(float_vector *)(sums + 16 * (v0 + v)) = kept[v];
    }
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

/* out (each, size) of token number ``last`` of a request, whose query (each, size) is not rotated yet.

   cache: the group's key of the request's token 0; values lie ``to_value`` behind their keys. room: ATTENTION_SHARE. */
static void attend_next(const float *query, const float *cache, long stride, long to_value, long first, long last,
                        long each, long size, long most, const float *cos, const float *sin, float scale, float *out,
                        float *room)
{
    long padded = WHOLE(size), vectors = padded / 16, step = WHOLE(most), found;
    float *queries = room, *sums = queries + each * padded, *block = sums + each * padded;
    float *scores = block + KEYS * padded;
    memset(room, 0, (size_t)(2 * each * padded) * sizeof *room);
    for (long e = 0; e < each; e++)
        rotate_head(query + e * size, queries + e * padded, cos, sin, size, scale);
    for (long t = first; t <= last; t += KEYS) {
        long tokens = last + 1 - t < KEYS ? last + 1 - t : KEYS;
        const float *keys = padded_block(cache + t * stride, stride, tokens, size, block, &found);
        for (long e = 0; e < each; e++) {
            float *to = scores + e * step + t - first;
            if (vectors == 4)
                score_block(queries + e * padded, keys, found, tokens, to, 4);
            else
                score_block(queries + e * padded, keys, found, tokens, to, vectors);
        }
    }
    float all[each];
    for (long e = 0; e < each; e++)
        all[e] = exponentials(scores + e * step, last + 1 - first);
    for (long t = first; t <= last; t += KEYS) {
        long tokens = last + 1 - t < KEYS ? last + 1 - t : KEYS;
        const float *values = padded_block(cache + to_value + t * stride, stride, tokens, size, block, &found);
        for (long e = 0; e < each; e++) {
            const float *weights = scores + e * step + t - first;
            if (vectors == 4)
                sum_block(weights, values, found, tokens, sums + e * padded, 4);
            else
                sum_block(weights, values, found, tokens, sums + e * padded, vectors);
        }
    }
    for (long e = 0; e < each; e++)
        for (long j = 0; j < size; j++)
            out[e * size + j] = sums[e * padded + j] / all[e];
}
