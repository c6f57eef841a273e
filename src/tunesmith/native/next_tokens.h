/* The layers of a decoder of the Llama family for one new token of each of many requests, by one call.

   x -> x + o(attention(rotate(q, k), v)), with q, k, v = projections of norm(x)
     -> y = x2 + down(silu(gate) up), with gate, up = projections of norm(x2)

   One parallel region: a layer is a dozen loops shared among the threads, each with a barrier at its end, which costs
   about a microsecond where a call of torch costs ten. Linear layers with biases are those of product.h, adapters'
   terms those of adapters.h, added panel by panel while the panel's result is in the first cache. */

/* Rows of results stand so far apart: rows of whole pages would all lie in the same few places of the first cache. */
#define APART(columns) ((columns) + 16)

/* Numbers and addresses of 8 bytes each, as serving/next_tokens.py writes them. */
typedef struct {
    const char *panels;
    long bits;
    const float *bias; /* or NULL */
} decoder_linear;

typedef struct {
    const float *attention_norm;
    decoder_linear qkv, output;
    const float *mlp_norm;
    decoder_linear gate_up, down;
    float *cache; /* (tokens of all slots, 2, groups, size) */
    long heads, groups, size, window, inner;
} decoder_layer;

typedef struct {
    double attention_epsilon, mlp_epsilon, scale;
} decoder_numbers;

typedef struct {
    const lora_segment *segments;
    long count, lds;
    float *shrunk; /* (rows, lds) */
} decoder_adapters;

static void norm_row(const float *x, const float *w, double epsilon, float *out, long width)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long j = 0; j < width; j++)
        sum += x[j] * x[j];
    float r = 1.0f / sqrtf(sum / (float)width + (float)epsilon);
#pragma omp simd
    for (long j = 0; j < width; j++)
        out[j] = x[j] * r * w[j];
}

/* out (rows, columns) (+)= the linear layers of a group, with biases and adapters, of x (rows, width). By all threads
   of a region, which meet at the end. laid: room for x; room: this thread's, for a panel's numbers. */
static void project(const float *x, const decoder_linear *linear, const decoder_adapters *adapters, long group,
                    float *laid, float *room, float *out, long ldo, long rows, long width, long columns, long add)
{
    long blocks = row_blocks(rows);
#pragma omp for schedule(static) nowait
    for (long k = 0; k < width; k += 16)
        for (long b = 0; b < blocks; b++) {
            long first = block_start(b, blocks, rows), count = block_start(b + 1, blocks, rows) - first;
            lay_out_rows(x + first * width, width, laid + first * width, count, k, k + 16 < width ? k + 16 : width);
        }
    shrink_share(adapters->segments, adapters->count, group, x, width, adapters->shrunk, adapters->lds, width,
                 omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    /* Threads share the machine with others: who is late gets less. */
#pragma omp for schedule(guided)
    for (long p = 0; p < (columns + PANEL - 1) / PANEL; p++) {
        product_panel(laid, linear->panels, linear->bits, linear->bias, out, ldo, rows, width, columns, add, p, room);
        expand_panel(adapters->segments, adapters->count, group, adapters->shrunk, adapters->lds, out, ldo, p);
    }
}

/* x (rows, width) from the embeddings of new tokens to what leaves the last layer; keys and values go to the caches.

   starts, positions: of each row, the token in the caches where its request begins, and its own place in the request.
   cos, sin (positions, size). hidden and laid (rows, the widest input); projected (rows, APART(the widest output)).
   room: for each thread, ``share`` numbers, at least ATTENTION_SHARE for ``most`` tokens of a request, and the widest
   input's panel. */
void next_tokens_float(float *x, const decoder_layer *layers, const decoder_numbers *numbers, long count,
                       const lora_segment *segments, long segment_count, float *shrunk, long lds, const long *starts,
                       const long *positions, const float *cos, const float *sin, float *hidden, float *laid,
                       float *projected, float *room, long share, long most, long rows, long width, long threads)
{
    const decoder_adapters adapters = {segments, segment_count, lds, shrunk};
#pragma omp parallel num_threads(threads)
    for (long n = 0; n < count; n++) {
        const decoder_layer *layer = layers + n;
        long heads = layer->heads, groups = layer->groups, size = layer->size, inner = layer->inner;
        float *own_room = room + omp_get_thread_num() * share;
        long each = heads / groups, stride = 2 * groups * size, fused = heads * size + stride;
        /* A row's groups together read memory forward; apart they are enough for all threads. */
        long shares = rows >= 2 * threads ? 1 : groups, some = groups / shares;
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i++)
            norm_row(x + i * width, layer->attention_norm, numbers[n].attention_epsilon, hidden + i * width, width);
        project(hidden, &layer->qkv, &adapters, 4 * n, laid, own_room, projected, APART(fused), rows, width, fused,
                0);
#pragma omp for schedule(guided)
        for (long task = 0; task < rows * shares; task++) {
            long i = task / shares, group = task % shares * some, last = positions[i];
            long first = layer->window && last + 1 > layer->window ? last + 1 - layer->window : 0;
            const float *row = projected + i * APART(fused), *key = row + (heads + group) * size;
            const float *c = cos + last * size, *s = sin + last * size;
            float *cache = layer->cache + starts[i] * stride + group * size, *own = cache + last * stride;
            const float *next = i + 1 < rows ? layer->cache + (starts[i + 1] + first) * stride + group * size : NULL;
            for (long g = 0; g < some; g++)
                rotate_head(key + g * size, own + g * size, c, s, size, 1);
            memcpy(own + groups * size, key + groups * size, (size_t)(some * size) * sizeof *own);
            attend_next(row + group * each * size, cache, stride, groups * size, first, last, some, each, size, most, c,
                        s, (float)numbers[n].scale, next, hidden + i * heads * size + group * each * size,
                        own_room);
        }
        project(hidden, &layer->output, &adapters, 4 * n + 1, laid, own_room, x, width, rows, heads * size, width,
                1);
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i++)
            norm_row(x + i * width, layer->mlp_norm, numbers[n].mlp_epsilon, hidden + i * width, width);
        project(hidden, &layer->gate_up, &adapters, 4 * n + 2, laid, own_room, projected, APART(2 * inner),
                rows, width, 2 * inner, 0);
#pragma omp for schedule(static) collapse(2)
        for (long i = 0; i < rows; i++)
            for (long begin = 0; begin < inner; begin += 256) {
                const float *gate = projected + i * APART(2 * inner), *up = gate + inner;
                float *to = hidden + i * inner;
                long end = begin + 256 < inner ? begin + 256 : inner;
#pragma omp simd
                for (long j = begin; j < end; j++)
                    to[j] = gate[j] / (1 + exp_float(-gate[j])) * up[j];
            }
        project(hidden, &layer->down, &adapters, 4 * n + 3, laid, own_room, x, width, rows, inner, width, 1);
    }
}
