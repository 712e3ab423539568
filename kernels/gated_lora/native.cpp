// The operator for a CPU, for the few tokens a request has in a decode step: every token meets the rows
// its blend uses and no others, and a module costs one call.
//
// Called through a plain C interface, so that no header of Python or torch is needed to build it.

#include <cmath>
#include <cstdint>

struct bf16 {
    uint16_t bits;
};

// `rows` rows of the factors from row `first` on, and the tokens that use them: tokens[token_at ...]. Their
// gates, and what the first half leaves for the second, lie at gate_at as [tokens, rows].
struct Block {
    int64_t first, rows, token_at, tokens, gate_at;
};

// Up to four rows of a block, and STRIP_TOKENS of its tokens: the unit that threads share out.
struct Strip {
    int64_t block, row, token;
};

struct Call {
    const void *a;  // [R, in]
    const void *b;  // [R, out]
    int64_t in, out;
    const Block *block;
    int64_t blocks;
    const Strip *strip;
    int64_t strips;
    const int32_t *tokens;
    const float *gates;
    float *hidden;
    int64_t threads;
};

// One module of a slot whose tokens gate themselves. With `owner`, rows belong to experts: `logits` = `experts`,
// and the softmax is over the `k` best scores (or magnitudes). Without, `logits` = `experts` * `rank`, and the
// gate is the mean of their softmaxes over the rank; without experts there is no gate. Scores are multiplied by `scale`
// in the softmax.
struct TokenGate {
    static const int64_t PARTS = 2048;  // experts, or ranks without `owner`, at most
    const float *stacked;              // [rank + logits, in]
    const float *bt;                   // [rank, out]
    const int32_t *owner;              // [rank]
    const int32_t *order;              // 0, 1, 2, ... for as many tokens as a call may have
    int64_t in, out, rank, logits, experts, k, magnitude, threads, serial;
    float scale;
};

// A factor that all tokens use, [rows, width]: A, or B transposed.
struct Plain {
    const float *factor;
    const int32_t *order;  // 0, 1, 2, ...
    int64_t rows, width, threads;
};

enum { SHRINK = 1, EXPAND = 2 };

// Tokens of a strip: their inputs stay in the cache while the rows pass.
static const int64_t STRIP_TOKENS = 24;
// Where several tokens share rows of B, a tile of so many rows and columns is copied for them. A narrower one
// would jump from row to row more often, which memory is slow at.
static const int64_t TILE = 256;
static const int64_t TILE_ROWS = 32;
// Rows of it that are asked for before they are copied.
static const int64_t AHEAD = 6;
// Columns at a time of a single token.
static const int64_t STREAM = 1024;
// A thread's columns begin at a multiple of this.
static const int64_t ALIGN = 64;

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
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define LEVEL 3
namespace avx512 {
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

// No wider instructions than these are used.
static int allowed = 3;

static int level() { return widest() < allowed ? widest() : allowed; }

#ifdef DISPATCH
#define CHOOSE(...)                            \
    switch (level()) {                         \
        case 3: return avx512::__VA_ARGS__;    \
        case 2: return avx2::__VA_ARGS__;      \
        default: return baseline::__VA_ARGS__; \
    }
#else
#define CHOOSE(...) return baseline::__VA_ARGS__;
#endif

template <class E, class F>
static void choose(const Call *call, E *y, const E *x, int half) {
    CHOOSE(run<E, F>(*call, y, x, half))
}

// Named for the type of x and y, then that of the factors.
extern "C" {
// Allow no wider instructions than `most` from now on; returns what is used then.
int gated_lora_allow(int most) {
    allowed = most;
    return level();
}
void gated_lora_f32_f32(const Call *call, float *y, const float *x, int half) {
    choose<float, float>(call, y, x, half);
}
void gated_lora_f32_bf16(const Call *call, float *y, const float *x, int half) {
    choose<float, bf16>(call, y, x, half);
}
void gated_lora_bf16_bf16(const Call *call, bf16 *y, const bf16 *x, int half) {
    choose<bf16, bf16>(call, y, x, half);
}
// hidden [tokens, rows] = x [tokens, width] times the factor transposed.
void gated_lora_shrink_f32(const Plain *plain, const float *x, float *hidden, int64_t tokens) {
    CHOOSE(shrink_plain(*plain, x, hidden, tokens))
}
// y [tokens, width] += hidden [tokens, rows] times the factor.
void gated_lora_expand_f32(const Plain *plain, float *y, const float *hidden, int64_t tokens) {
    CHOOSE(expand_plain(*plain, y, hidden, tokens))
}
// scratch: tokens * (rank + logits), then the gate, tokens * (experts, or rank, or nothing), then tokens * rank.
void gated_lora_tokens_f32(const TokenGate *own, float *y, const float *x, float *scratch, int64_t tokens) {
    CHOOSE(run_tokens(*own, y, x, scratch, tokens))
}
}
