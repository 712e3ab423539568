// All layers of a decode step in one call, for a CPU in float32: the operators are those of the neighbouring libraries,
// given as pointers. A step of a small model would else be some five hundred calls from Python, which take as long as
// the weights do.
//
// Called through a plain C interface, so that no header of Python or torch is needed to build it.

#include <cstdint>

// The C functions of packed_linear, pointwise, paged_attention and gated_lora; see there.
struct Operators {
    void (*linear)(const void *matrix, float *y, const float *x, int64_t tokens, int64_t threads);
    void (*norm)(float *y, const float *x, const float *weight, int64_t tokens, int64_t n, float epsilon, int64_t threads);
    void (*rotate)(float *x, const float *cos, const float *sin, int64_t tokens, int64_t heads, int64_t dim,
                   int64_t threads);
    void (*swiglu)(float *gate, const float *up, int64_t n, int64_t threads);
    void (*attend)(const void *rows, const void *layer, const float *query, const float *key, const float *value,
                   float *keys, float *values, float *out, const float *sinks);
    void (*adapt)(const void *call, float *y, const float *x, int half);
};

struct Projection {
    const void *matrix;
    int64_t rows;
    int64_t serial;  // for fewer tokens one thread is enough
};

enum Place { Q, K, V, O, GATE, UP, DOWN, PLACES };

struct Layer {
    const float *before_attention, *before_feed_forward;  // weights of the norms
    Projection projections[PLACES];
    const void *attention;
    float *keys, *values;
    const float *sinks;
    int64_t heads, kv_heads, dim;
    float epsilon, epsilon_feed_forward;
};

struct Step {
    const Operators *operators;
    const Layer *layers;
    const void *const *adapters;  // [layers, PLACES], each null or a call of gated_lora; or null
    const void *rows;
    const float *cos, *sin;  // [tokens, dim]
    float *hidden;           // [tokens, width], changed in place
    float *room;             // 4 * tokens * the widest of a layer's inputs and outputs
    int64_t count, tokens, width, widest, threads, serial;  // pointwise work on fewer than `serial` values: one thread
};

// Shrink and expand, as gated_lora numbers them.
static const int BOTH = 3;

static int64_t team(const Step &s, int64_t values) { return values >= s.serial ? s.threads : 1; }

static void project(const Step &s, int64_t layer, Place place, float *y, const float *x) {
    const Projection &p = s.layers[layer].projections[place];
    s.operators->linear(p.matrix, y, x, s.tokens, s.tokens >= p.serial ? s.threads : 1);
    const void *adapter = s.adapters ? s.adapters[layer * PLACES + place] : nullptr;
    if (adapter) s.operators->adapt(adapter, y, x, BOTH);
}

static void add(float *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

extern "C" {
int64_t decoder_stack_layer_bytes(void) { return sizeof(Layer); }

void decoder_stack(const Step *step) {
    const Step &s = *step;
    const Operators &call = *s.operators;
    const int64_t n = s.tokens, part = n * s.widest, width = n * s.width;
    float *x = s.room, *a = x + part, *b = a + part, *c = b + part;
    for (int64_t i = 0; i < s.count; i++) {
        const Layer &layer = s.layers[i];
        call.norm(x, s.hidden, layer.before_attention, n, s.width, layer.epsilon, team(s, width));
        project(s, i, Q, a, x);
        project(s, i, K, b, x);
        project(s, i, V, c, x);
        call.rotate(a, s.cos, s.sin, n, layer.heads, layer.dim, team(s, n * layer.heads * layer.dim));
        call.rotate(b, s.cos, s.sin, n, layer.kv_heads, layer.dim, team(s, n * layer.kv_heads * layer.dim));
        call.attend(s.rows, layer.attention, a, b, c, layer.keys, layer.values, x, layer.sinks);
        project(s, i, O, a, x);
        add(s.hidden, a, width);
        call.norm(x, s.hidden, layer.before_feed_forward, n, s.width, layer.epsilon_feed_forward, team(s, width));
        project(s, i, GATE, a, x);
        project(s, i, UP, b, x);
        const int64_t inner = n * layer.projections[GATE].rows;
        call.swiglu(a, b, inner, team(s, inner));
        project(s, i, DOWN, b, a);
        add(s.hidden, b, width);
    }
}
}
