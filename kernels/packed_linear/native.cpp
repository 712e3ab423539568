// y = x Wᵀ + b for a CPU, with W as it is stored: float32, bfloat16, float16, bytes, or blocks of 32 as GGUF has them.
// Weights are widened in registers and multiplied in float32.
//
// Called through a plain C interface, so that no header of Python or torch is needed to build it.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif

struct bf16 {
    uint16_t bits;
};

// A matrix [rows, 32 * blocks]. A row takes `stride` bytes; of int8, the products of a row are multiplied by its scale.
struct Matrix {
    const uint8_t *data;
    const float *scales;  // [rows], or null
    const float *bias;    // [rows], or null
    int64_t rows, blocks, stride, kind, set;
};

enum Kind { KIND_BF16, KIND_F16, KIND_INT8, KIND_Q8_0, KIND_Q4_0, KIND_Q4_1, KIND_F32 };
// Instruction sets, those but the last as processor.inc numbers them; BEST is the best of those that the processor has.
enum Set { BEST, BASELINE, AVX2, AVX512, AMX };

// Values of a block, whatever the kind.
static const int64_t BLOCK = 32;
// Rows that share what is read of x.
static const int64_t ROWS = 4;
// Blocks of so many rows are widened at a time for several tokens, and stay in the nearest cache.
static const int64_t PIECE = 8;
// Tokens of several that are multiplied at a time.
static const int64_t SLAB = 64;

// The pragmas alone do not tell the preprocessor of g++ before 13 what there is: LEVEL does.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define DISPATCH 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LEVEL 2
namespace avx2 {
#include "native_body.inc"
}
#undef LEVEL
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define LEVEL 3
namespace avx512 {
#include "native_body.inc"
}
#undef LEVEL
#pragma GCC pop_options
#if __GNUC__ >= 11 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX_UNIT 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,prefer-vector-width=512")
namespace amx {
#include "amx.inc"
}
#pragma GCC pop_options
#endif
#endif

#define LEVEL 1
namespace baseline {
#include "native_body.inc"
}
#undef LEVEL

#include "../processor.inc"

#ifdef MATRIX_UNIT
// Whether there is a matrix unit, and the system lets this process use it: tiles are kept for a thread only where a
// process has asked for that. A virtual machine or an old kernel may refuse.
static bool may_use_tiles() {
    unsigned a, b, c, d;
    __cpuid_count(7, 0, a, b, c, d);
    const unsigned tiles = 1u << 24, bfloat16 = 1u << 22;
    if (!(d & tiles) || !(d & bfloat16)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned state = 3u << 17;  // the shapes of tiles, and what they hold
    if ((low & state) != state) return false;
    const int ask = 0x1023, data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, ask, data) == 0;
}
#endif

static int64_t best() {
#ifdef MATRIX_UNIT
    static const bool tiles = widest() == AVX512 && may_use_tiles();
    if (tiles) return AMX;
#endif
    return widest();
}

// What is asked for, where the processor has it; the matrix unit has no float32.
static int64_t chosen(const Matrix &m) {
    const int64_t set = m.set == BEST || m.set > best() ? best() : m.set;
    return set == AMX && m.kind == KIND_F32 ? AVX512 : set;
}

extern "C" {
int64_t packed_linear_best(void) { return best(); }

// y [tokens, rows] of x [tokens, 32 * blocks]. The sums of a token are made in one order, however many others there are.
void packed_linear(const Matrix *matrix, float *y, const float *x, int64_t tokens, int64_t threads) {
    switch (chosen(*matrix)) {
#ifdef MATRIX_UNIT
        case AMX: return amx::run(*matrix, y, x, tokens, threads);
#endif
#ifdef DISPATCH
        case AVX512: return avx512::run(*matrix, y, x, tokens, threads);
        case AVX2: return avx2::run(*matrix, y, x, tokens, threads);
#endif
        default: return baseline::run(*matrix, y, x, tokens, threads);
    }
}

// out [count, 32 * blocks]: rows `which`, or where it is null the rows from `first` on, as float32.
void packed_linear_widen(const Matrix *matrix, float *out, const int64_t *which, int64_t first, int64_t count,
                         int64_t threads) {
    switch (chosen(*matrix)) {
#ifdef DISPATCH
        case AMX:
        case AVX512: return avx512::widen_rows(*matrix, out, which, first, count, threads);
        case AVX2: return avx2::widen_rows(*matrix, out, which, first, count, threads);
#endif
        default: return baseline::widen_rows(*matrix, out, which, first, count, threads);
    }
}
}
