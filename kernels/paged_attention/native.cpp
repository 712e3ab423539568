// One token a row over a paged cache, for a CPU: the new keys and values are stored, then every row attends to its
// own pages. Rows may be neighbouring tokens of a prompt. One call a layer.
//
// Called through a plain C interface, so that no header of Python or torch is needed to build it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 {
    uint16_t bits;
};

// What the layers of a step share.
struct Rows {
    const int32_t *tables;   // [count, table_stride], the pages of each row
    const int32_t *lengths;  // [count], tokens in the cache, the new one included
    const int64_t *slots;    // [count], where the new token goes: page * page size + offset
    int64_t count, table_stride, page, threads;
};

struct Layer {
    int64_t heads, kv_heads, dim, value_dim, window;  // window 0: none
    float scale, softcap;                             // softcap 0: none
};

// Tokens whose scores are computed before their values are added up.
static const int64_t BLOCK = 32;
// Neighbouring rows of a sequence that are computed together.
static const int64_t TILE = 16;

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#include <immintrin.h>
#define DISPATCH 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LEVEL 2
namespace avx2 {
#include "native_body.inc"
}
#undef LEVEL
#pragma GCC pop_options
#endif

#define LEVEL 1
namespace baseline {
#include "native_body.inc"
}
#undef LEVEL

#include "../processor.inc"

template <class E>
static void choose(const Rows *rows, const Layer *layer, const E *query, const E *key, const E *value, E *keys,
                   E *values, E *out, const float *sinks) {
#ifdef DISPATCH
    if (widest() > 1) return avx2::run<E>(*rows, *layer, query, key, value, keys, values, out, sinks);
#endif
    baseline::run<E>(*rows, *layer, query, key, value, keys, values, out, sinks);
}

extern "C" {
void paged_attention_f32(const Rows *rows, const Layer *layer, const float *query, const float *key,
                         const float *value, float *keys, float *values, float *out, const float *sinks) {
    choose<float>(rows, layer, query, key, value, keys, values, out, sinks);
}
void paged_attention_bf16(const Rows *rows, const Layer *layer, const bf16 *query, const bf16 *key,
                          const bf16 *value, bf16 *keys, bf16 *values, bf16 *out, const float *sinks) {
    choose<bf16>(rows, layer, query, key, value, keys, values, out, sinks);
}
}
