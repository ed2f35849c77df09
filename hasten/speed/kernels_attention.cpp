// Softmax attention without the [queries, keys] matrix in memory (Dao et al. 2022), on bfloat16 products.

#include "kernels.h"

namespace {

// C [32, 32] (+)= A [32, 32 steps] B: A row-major, B in 1 KiB tiles of 16 row pairs x 16 columns, `next` bytes apart
// along the sum; its second 16 columns start at b1.
template <bool Add>
inline void product(const bf16* a, int64_t lda, const char* b0, const char* b1, int64_t next, float* c, int64_t ldc,
                    int64_t steps) {
#ifdef __AMX_BF16__
    if (Add) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + T, ldc * 4);
        _tile_loadd(2, c + T * ldc, ldc * 4);
        _tile_loadd(3, c + T * ldc + T, ldc * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, a + 32 * k, lda * 2);
        _tile_loadd(6, b0 + next * k, 64);
        _tile_loadd(5, a + T * lda + 32 * k, lda * 2);
        _tile_loadd(7, b1 + next * k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + T, ldc * 4);
    _tile_stored(2, c + T * ldc, ldc * 4);
    _tile_stored(3, c + T * ldc + T, ldc * 4);
#else
    for (int row = 0; row < 32; row += 8) {
        __m512 acc[8][2];
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j)
                acc[i][j] = Add ? _mm512_loadu_ps(c + (row + i) * ldc + T * j) : _mm512_setzero_ps();
        for (int64_t k = 0; k < steps; ++k)
            for (int r = 0; r < T; ++r) {
                const __m512bh x = (__m512bh)_mm512_loadu_si512(b0 + next * k + 64 * r);
                const __m512bh y = (__m512bh)_mm512_loadu_si512(b1 + next * k + 64 * r);
                for (int i = 0; i < 8; ++i) {
                    int32_t pair;
                    std::memcpy(&pair, a + (row + i) * lda + 32 * k + 2 * r, 4);
                    const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
                    acc[i][0] = _mm512_dpbf16_ps(acc[i][0], p, x);
                    acc[i][1] = _mm512_dpbf16_ps(acc[i][1], p, y);
                }
            }
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + (row + i) * ldc + T * j, acc[i][j]);
    }
#endif
}

constexpr int QB = 64, KB = 256;             // queries and keys of a block
constexpr int G = 32, LDS = G + T, LDP = KB + 32;  // scores are made G x G at a time; strides that share no cache sets
constexpr int MAX_D = 256;
constexpr float LOW = -1e30f, SLACK = 8.0f;  // no key seen yet; log2 of how far scores may pass the shift

struct Attention {
    const void *q, *k, *v;
    void* out;
    const float* mask;  // additive, or null
    char* scratch;      // K and V of all heads in tiles
    int64_t batch, heads, kv_heads, queries, keys, dim, dim_v;
    int64_t qs[3], ks[3], vs[3], os[3];  // strides in elements: batch, head, token
    int64_t ms[3];                       // of the mask: batch, head, query; its keys are next to each other
    float scale;
    int32_t causal, wide;  // wide: float32 in and out, bfloat16 inside
};

// `rows` rows of `n` values as bfloat16 [32 or 64, padded]; zeros elsewhere.
inline void copy_rows(const void* p, int64_t stride, bool wide, int64_t rows, int64_t all, int64_t n, int64_t padded,
                      bf16* out) {
    for (int64_t i = 0; i < rows; ++i) {
        const char* row = at(p, i * stride, wide);
        for (int64_t j = 0; j < padded; j += 32) {
            const __m512i v =
                wide ? (__m512i)_mm512_cvtne2ps_pbh(load(row, true, j + T, n), load(row, true, j, n))
                : j + 32 <= n
                    ? _mm512_loadu_si512(row + 2 * j)
                    : _mm512_maskz_loadu_epi16(n > j ? (1u << (n - j)) - 1 : 0, row + 2 * j);
            _mm512_storeu_si512(out + i * padded + j, v);
        }
    }
    std::fill_n(out + rows * padded, (all - rows) * padded, bf16(0));
}

// 32 keys of K and V in tiles. K: [2 groups of 16 keys][dim / 32][16 pairs][16 keys][2]; V: [dim_v / 16][16 pairs of
// keys][16][2].
void pack(const Attention& s, int64_t b, int64_t h, int64_t key, char* k_out, char* v_out) {
    const int64_t D = up(s.dim, 32), E = up(s.dim_v, 32), rows = std::min<int64_t>(G, s.keys - key);
    alignas(64) bf16 copy[G * MAX_D];
    const char* k = at(s.k, b * s.ks[0] + h * s.ks[1] + key * s.ks[2], s.wide);
    int64_t stride = s.ks[2] * 2;
    if (s.wide || rows < G || s.dim % 32) {
        copy_rows(k, s.ks[2], s.wide, rows, G, s.dim, D, copy);
        k = reinterpret_cast<char*>(copy);
        stride = D * 2;
    }
    for (int g = 0; g < 2; ++g)
        for (int64_t d = 0; d < D / 32; ++d)
            transpose(k + g * T * stride + d * 64, stride, T, 0xffff, k_out + (g * (D / 32) + d) * 1024);
    const char* v = at(s.v, b * s.vs[0] + h * s.vs[1] + key * s.vs[2], s.wide);
    stride = s.vs[2] * 2;
    if (s.wide || rows < G || s.dim_v % 32) {
        copy_rows(v, s.vs[2], s.wide, rows, G, s.dim_v, E, copy);
        v = reinterpret_cast<char*>(copy);
        stride = E * 2;
    }
    alignas(64) bf16 order[2][32];  // words of two rows in turn: the first 16 of each, the second 16
    for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 2; ++j) order[j][i] = bf16(T * j + i / 2 + (i % 2) * 32);
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int r = 0; r < T; ++r)
        for (int64_t e = 0; e < E; e += 32) {
            const __m512i even = _mm512_loadu_si512(v + 2 * r * stride + e * 2);
            const __m512i odd = _mm512_loadu_si512(v + (2 * r + 1) * stride + e * 2);
            _mm512_storeu_si512(v_out + e * 64 + r * 64, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(v_out + e * 64 + 1024 + r * 64, _mm512_permutex2var_epi16(even, high, odd));
        }
}

struct Work {
    alignas(64) bf16 q[QB * MAX_D];
    alignas(64) float scores[2][G * LDS];
    alignas(64) bf16 probs[QB * LDP];
    alignas(64) float out[QB * (MAX_D + T)];
    alignas(64) float sums[QB * T];  // of each lane
    float shift[QB];
};

// Mask, causality and the end of the keys, on the scores [G, G] of queries `first` .. before their scale.
void hide(const Attention& s, float* scores, int64_t b, int64_t h, int64_t first, int64_t key) {
    const __m512 never = _mm512_set1_ps(-INFINITY), per = _mm512_set1_ps(1 / s.scale);
    for (int64_t i = 0; i < std::min<int64_t>(G, s.queries - first); ++i) {
        const int64_t seen = std::min(s.keys, s.causal ? first + i + 1 : s.keys) - key;
        const float* m = s.mask ? s.mask + b * s.ms[0] + h * s.ms[1] + (first + i) * s.ms[2] + key : nullptr;
        for (int64_t j = 0; j < G; j += T) {
            float* at = scores + i * LDS + j;
            const __mmask16 on = lanes(seen - j);
            __m512 v = _mm512_loadu_ps(at);
            if (m) v = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(on, m + j), per, v);
            _mm512_storeu_ps(at, _mm512_mask_mov_ps(never, on, v));
        }
    }
}

// A larger shift for query i: what was added up so far, and the block's first j probabilities, shrink by a power of 2.
__attribute__((noinline)) void raise(Work& w, int i, const float* s, int64_t j, float c, int64_t E) {
    const float top = std::ceil(c * _mm512_reduce_max_ps(_mm512_max_ps(_mm512_loadu_ps(s), _mm512_loadu_ps(s + T))));
    const __m512 by = _mm512_set1_ps(std::exp2(w.shift[i] - top));
    w.shift[i] = top;
    _mm512_storeu_ps(w.sums + i * T, _mm512_mul_ps(_mm512_loadu_ps(w.sums + i * T), by));
    float* out = w.out + i * (E + T);
    for (int64_t e = 0; e < E; e += T) _mm512_storeu_ps(out + e, _mm512_mul_ps(_mm512_loadu_ps(out + e), by));
    bf16* p = w.probs + i * LDP;
    for (int64_t k = 0; k < j; k += T) store(p + k, false, 0, T, _mm512_mul_ps(load(p + k, false, 0, T), by));
}

// Probabilities of G queries and G keys, 2^(c s - shift), and their sums. Any shift is exact (Milakov & Gimelshein
// 2018); one that moves only when scores pass it by 2^8 spares the search for the largest.
inline void soften(Work& w, int first, const float* scores, int64_t j, float c, int64_t E) {
    const __m512 cc = _mm512_set1_ps(c), slack = _mm512_set1_ps(SLACK);
    for (int i = 0; i < G; ++i) {
        const float* s = scores + i * LDS;
        const int row = first + i;
        const __m512 a = _mm512_loadu_ps(s), b = _mm512_loadu_ps(s + T);
        __m512 shift = _mm512_set1_ps(w.shift[row]);
        __m512 x = _mm512_fmsub_ps(a, cc, shift), y = _mm512_fmsub_ps(b, cc, shift);
        if (__builtin_expect(_mm512_cmp_ps_mask(_mm512_max_ps(x, y), slack, _CMP_GT_OQ), 0)) {
            raise(w, row, s, j, c, E);
            shift = _mm512_set1_ps(w.shift[row]);
            x = _mm512_fmsub_ps(a, cc, shift);
            y = _mm512_fmsub_ps(b, cc, shift);
        }
        x = exp2(x);
        y = exp2(y);
        float* sum = w.sums + row * T;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_add_ps(x, y)));
        _mm512_storeu_si512(w.probs + row * LDP + j, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
}

void attend(const Attention& s, Work& w, int64_t b, int64_t h, int64_t first, const char* K, const char* V) {
    const int64_t D = up(s.dim, 32), E = up(s.dim_v, 32), ldo = E + T;
    const int rows = int(std::min<int64_t>(QB, s.queries - first)), all = int(up(rows, G));
    const float c = s.scale * 1.44269504f;
    copy_rows(at(s.q, b * s.qs[0] + h * s.qs[1] + first * s.qs[2], s.wide), s.qs[2], s.wide, rows, all, s.dim, D, w.q);
    std::fill_n(w.out, all * ldo, 0.0f);
    std::fill_n(w.sums, QB * T, 0.0f);
    std::fill_n(w.shift, QB, LOW);
    const int64_t end = up(s.causal ? std::min(s.keys, first + rows) : s.keys, G);
    for (int64_t key = 0; key < end; key += KB) {
        const int64_t width = std::min<int64_t>(KB, end - key);
        for (int64_t j = 0; j < width; j += G)
            for (int i = 0; i < all; i += G) {
                const char* tile = K + (key + j) * D * 2;
                float* scores = w.scores[i / G % 2];
                product<false>(w.q + i * D, D, tile, tile + D * 32, 1024, scores, LDS, D / 32);
                if (s.mask || key + j + G > s.keys || (s.causal && key + j + G > first + i + 1))
                    hide(s, scores, b, h, first + i, key + j);
                soften(w, i, scores, j, c, E);
            }
        for (int64_t e = 0; e < E; e += 32)
            for (int i = 0; i < all; i += G) {
                const char* tile = V + key * E * 2 + e * 64;
                product<true>(w.probs + i * LDP, LDP, tile, tile + 1024, E * 64, w.out + i * ldo + e, ldo, width / 32);
            }
    }
    const char* out = at(s.out, b * s.os[0] + h * s.os[1] + first * s.os[2], s.wide);
    for (int i = 0; i < rows; ++i) {
        const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(w.sums + i * T));
        const __m512 by = _mm512_set1_ps(sum > 0 ? 1 / sum : 0.0f);  // no key at all: zeros, as torch
        char* row = const_cast<char*>(at(out, i * s.os[2], s.wide));
        for (int64_t e = 0; e < s.dim_v; e += T)
            store(row, s.wide, e, s.dim_v, _mm512_mul_ps(_mm512_loadu_ps(w.out + i * ldo + e), by));
    }
}

}  // namespace

extern "C" {

// Bytes of scratch that hasten_attention needs.
int64_t hasten_attention_scratch(const Attention* s) {
    return s->batch * s->kv_heads * up(s->keys, 32) * (up(s->dim, 32) + up(s->dim_v, 32)) * 2 + 64;
}

void hasten_attention(const Attention* given, int threads) {
    const Attention& s = *given;
    const int64_t L = up(s.keys, 32), K_size = L * up(s.dim, 32) * 2, size = K_size + L * up(s.dim_v, 32) * 2;
    char* scratch = reinterpret_cast<char*>(up(reinterpret_cast<int64_t>(s.scratch), 64));
    const int64_t groups = s.batch * s.kv_heads, blocks = (s.queries + QB - 1) / QB;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        static thread_local Work w;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * (L / 32); ++i) {
            const int64_t g = i / (L / 32), key = i % (L / 32) * 32;
            char* own = scratch + g * size;
            pack(s, g / s.kv_heads, g % s.kv_heads, key, own + key * up(s.dim, 32) * 2,
                 own + K_size + key * up(s.dim_v, 32) * 2);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.batch * s.heads * blocks; ++i) {
            const int64_t b = i / blocks / s.heads, h = i / blocks % s.heads;
            const char* own = scratch + (b * s.kv_heads + h / (s.heads / s.kv_heads)) * size;
            attend(s, w, b, h, i % blocks * QB, own, own + K_size);
        }
    }
}

}
