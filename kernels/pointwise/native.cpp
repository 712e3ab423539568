// What lies between the products of a layer, for a CPU: RMSNorm, rotary embedding and SwiGLU, one call each. With few
// tokens they cost little but their calls, of which torch needs four to ten.
//
// Called through a plain C interface, so that no header of Python or torch is needed to build it.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#include <immintrin.h>
#define DISPATCH 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "native_body.inc"
}
#pragma GCC pop_options
#endif

namespace baseline {
#include "native_body.inc"
}

#include "../processor.inc"

#ifdef DISPATCH
#define CHOOSE(call)                     \
    if (widest() > 1) return avx2::call; \
    return baseline::call
#else
#define CHOOSE(call) return baseline::call
#endif

extern "C" {
// y [tokens, n] = x / sqrt(mean of x^2 + epsilon) * weight
void pointwise_rms_norm(float *y, const float *x, const float *weight, int64_t tokens, int64_t n, float epsilon,
                        int64_t threads) {
    CHOOSE(rms_norm(y, x, weight, tokens, n, epsilon, threads));
}
// x [tokens, heads, dim] in place: halves (a, b) become (a cos - b sin, b cos + a sin); cos and sin [tokens, dim].
void pointwise_rotate(float *x, const float *cos, const float *sin, int64_t tokens, int64_t heads, int64_t dim,
                      int64_t threads) {
    CHOOSE(rotate(x, cos, sin, tokens, heads, dim, threads));
}
// logits [.., vocabulary] in place: minus infinity in `rows` where a bit of masks [count, words] is 0.
void pointwise_forbid(float *logits, int64_t vocabulary, const uint32_t *bits, int64_t words, const int64_t *rows,
                      int64_t count) {
    CHOOSE(forbid(logits, vocabulary, bits, words, rows, count));
}
// gate [n] in place: silu(gate) * up
void pointwise_swiglu(float *gate, const float *up, int64_t n, int64_t threads) {
    CHOOSE(swiglu(gate, up, n, threads));
}
}
