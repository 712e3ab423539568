// What lies between a block's projections, for a CPU: one call a block and piece of a batch.
//
// Called through a plain C interface, so that no header of Python or torch is needed to build it.

#include <cmath>
#include <cstdint>

struct Mix {
    const float *gate, *up;      // [tokens, width], what the base's first projections gave; up unless `gated`: unused
    const float *low;            // [tokens, ...], x times the stacked first factors
    const float *gate_b, *up_b;  // [experts, rank, width], rows a stride apart
    const float *last_a;         // [experts, last_rank, width]
    const float *weights;        // [tokens, experts]
    float *hidden;               // [tokens, width], written
    float *last;                 // [blocks, tokens, experts, last_rank], zeroed; the first part is the sum at the end
    int64_t tokens, width, experts;
    int64_t stride_gate, stride_up, stride_low, stride_gate_b, stride_up_b;
    int64_t gate_column, up_column, gate_rank, up_rank, last_rank;
    int64_t activation, gated, threads;
};

// Columns at a time: rows of factors that several tokens share stay in the cache; a single token reads long rows.
static const int64_t BLOCK = 256, ALONE = 4 * BLOCK;
// Of a call.
static const int64_t MAX_TOKENS = 128;

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

extern "C" void mixlora_mix_f32(const Mix *call) {
#ifdef DISPATCH
    if (widest() > 1) return avx2::run(*call);
#endif
    baseline::run(*call);
}
