// Softmax attention without the [queries, keys] matrix in memory (Dao et al. 2022), on bfloat16 products.

#include "kernels.h"

#define INLINE inline __attribute__((always_inline))  // one loop holds a product and what runs beside it

namespace {

constexpr int QB = 256, KB = 512;            // most queries of a thread's block; keys of one update of its outputs
constexpr int G = 32, LDP = KB + 32;         // scores are made G x G at a time; a stride that shares no cache sets
constexpr int MAX_D = 256;
constexpr float LOW = -1e30f, SLACK = 8.0f;  // no key seen yet; log2 of how far scores may pass the shift
constexpr float SAFE = 64.0f;                // log2 of what needs no shift: sums of 2^64 and 2^-64 are float32's

// C [32, 32] (+)= A [32, 32 steps] B: A row-major, B in pairs of 1 KiB tiles of 16 row pairs x 16 columns. B is read
// past the first cache, which is C's and the scores'. `meanwhile(k)` runs beside step k, on the other execution units.
template <bool Add, class F>
INLINE void product(const bf16* a, int64_t lda, const char* b, float* c, int64_t ldc, int64_t steps, F&& meanwhile) {
#ifdef __AMX_BF16__
    asm volatile("" ::: "memory");  // g++ 12 does not know that tile loads read memory
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
        _tile_stream_loadd(6, b + 2048 * k, 64);
        _tile_loadd(5, a + T * lda + 32 * k, lda * 2);
        _tile_stream_loadd(7, b + 2048 * k + 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        meanwhile(int(k));
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
                const __m512bh x = (__m512bh)_mm512_loadu_si512(b + 2048 * k + 64 * r);
                const __m512bh y = (__m512bh)_mm512_loadu_si512(b + 2048 * k + 1024 + 64 * r);
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
    for (int64_t k = 0; k < steps; ++k) meanwhile(int(k));
#endif
}

struct Attention {
    const void *q, *k, *v;
    void* out;
    const float* mask;  // additive, or null
    char* scratch;      // K and V of all heads in tiles, and the largest |k|^2 of every 32 keys
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

// 32 keys of K and V in tiles. K: [dim / 32][2 groups of 16 keys][16 pairs][16 keys][2]; V: [dim_v / 32, v_step
// bytes apart][2 groups of 16 channels][16 pairs of keys][16][2]. Returns the largest |k|^2.
float pack(const Attention& s, int64_t b, int64_t h, int64_t key, char* k_out, char* v_out, int64_t v_step) {
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
            transpose(k + g * T * stride + d * 64, stride, T, 0xffff, k_out + (d * 2 + g) * 1024);
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < D; ++i) {
        const __m512bh pairs = (__m512bh)_mm512_loadu_si512(k_out + i * 64);
        squares[i / T % 2] = _mm512_dpbf16_ps(squares[i / T % 2], pairs, pairs);
    }
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
            _mm512_storeu_si512(v_out + e / 32 * v_step + r * 64, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(v_out + e / 32 * v_step + 1024 + r * 64, _mm512_permutex2var_epi16(even, high, odd));
        }
    return _mm512_reduce_max_ps(_mm512_max_ps(squares[0], squares[1]));
}

struct Work {
    alignas(64) bf16 q[QB * MAX_D];
    alignas(64) float scores[2][G * G];
    alignas(64) bf16 probs[G * LDP];
    alignas(64) float out[QB * (MAX_D + T)];
    alignas(64) float sums[QB * T];  // of each lane
    float shift[QB];
    bool bounded[QB / G];  // |q| |k| is so small that no score of these queries needs a shift
};

// The largest |q|^2 of G rows of D values.
float largest(const bf16* q, int64_t D) {
    float most = 0;
    for (int i = 0; i < G; ++i) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 32) {
            const __m512bh pairs = (__m512bh)_mm512_loadu_si512(q + i * D + d);
            squares = _mm512_dpbf16_ps(squares, pairs, pairs);
        }
        most = std::max(most, _mm512_reduce_add_ps(squares));
    }
    return most;
}

// Mask, causality and the end of the keys, on the scores [G, G] of queries `first` .. before their scale.
void hide(const Attention& s, float* scores, int64_t b, int64_t h, int64_t first, int64_t key) {
    const __m512 never = _mm512_set1_ps(-INFINITY), per = _mm512_set1_ps(1 / s.scale);
    for (int64_t i = 0; i < std::min<int64_t>(G, s.queries - first); ++i) {
        const int64_t seen = std::min(s.keys, s.causal ? first + i + 1 : s.keys) - key;
        const float* m = s.mask ? s.mask + b * s.ms[0] + h * s.ms[1] + (first + i) * s.ms[2] + key : nullptr;
        for (int64_t j = 0; j < G; j += T) {
            float* at = scores + i * G + j;
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
    bf16* p = w.probs + i % G * LDP;
    for (int64_t k = 0; k < j; k += T) store(p + k, false, 0, T, _mm512_mul_ps(load(p + k, false, 0, T), by));
}

// 2^t to bfloat16's precision: as exp2, with a quadratic of relative error 1.8e-3, less than half the last place.
inline __m512 exp2_short(__m512 t) {
    const __m512 f = _mm512_reduce_ps(t, 0x09);
    __m512 p = _mm512_set1_ps(0.33718944f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.65763629f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0017248f));
    return _mm512_scalef_ps(p, t);
}

// Probabilities of `rows` queries from `row` on and G keys, 2^(c s - shift), and their sums. Any shift is exact
// (Milakov & Gimelshein 2018); one that moves only when scores pass it by 2^8 spares the search for the largest, and
// where |q| |k| bounds the scores none is needed.
template <bool Bounded>
INLINE void soften(Work& w, int row, int rows, const float* scores, int64_t j, float c, int64_t E) {
    const __m512 cc = _mm512_set1_ps(c), slack = _mm512_set1_ps(SLACK);
    for (const int end = row + rows; row < end; ++row) {
        const float* s = scores + row % G * G;
        const __m512 a = _mm512_loadu_ps(s), b = _mm512_loadu_ps(s + T);
        __m512 shift = _mm512_set1_ps(w.shift[row]);
        __m512 x = _mm512_fmsub_ps(a, cc, shift), y = _mm512_fmsub_ps(b, cc, shift);
        if (!Bounded && __builtin_expect(_mm512_cmp_ps_mask(_mm512_max_ps(x, y), slack, _CMP_GT_OQ), 0)) {
            raise(w, row, s, j, c, E);
            shift = _mm512_set1_ps(w.shift[row]);
            x = _mm512_fmsub_ps(a, cc, shift);
            y = _mm512_fmsub_ps(b, cc, shift);
        }
        x = exp2_short(x);
        y = exp2_short(y);
        float* sum = w.sums + row * T;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_add_ps(x, y)));
        _mm512_storeu_si512(w.probs + row % G * LDP + j, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
}

// Probabilities and sums of G queries, from row i of the block, for `width` keys; while the tiles are at some keys'
// scores, the probabilities of the keys before them are made.
template <bool Bounded>
void weigh(const Attention& s, Work& w, int64_t b, int64_t h, int64_t first, int i, int64_t key, int64_t width,
           const char* K) {
    const int64_t D = up(s.dim, 32), E = up(s.dim_v, 32);
    const int part = int((G * 32 + D - 1) / D);  // rows softened beside one step of the product
    const float c = s.scale * 1.44269504f;
    for (int64_t j = 0; j < width; j += G) {
        float *scores = w.scores[j / G % 2], *last = w.scores[(j / G + 1) % 2];
        const auto soften_last = [&](int k) {
            if (j > 0) soften<Bounded>(w, i + k * part, std::min(part, G - k * part), last, j - G, c, E);
        };
        product<false>(w.q + i * D, D, K + (key + j) * D * 2, scores, G, D / 32, soften_last);
        if (s.mask || key + j + G > s.keys || (s.causal && key + j + G > first + i + 1))
            hide(s, scores, b, h, first + i, key + j);
        if (j + G >= width) soften<Bounded>(w, i, G, scores, j, c, E);
    }
}

// `rows` queries of one head, from `first` on. K's and V's tiles are its own; most_k is its largest |k|^2.
void attend(const Attention& s, Work& w, int64_t b, int64_t h, int64_t first, int rows, const char* K, const char* V,
            float most_k) {
    const int64_t D = up(s.dim, 32), E = up(s.dim_v, 32), ldo = E + T;
    const int all = int(up(rows, G));
    copy_rows(at(s.q, b * s.qs[0] + h * s.qs[1] + first * s.qs[2], s.wide), s.qs[2], s.wide, rows, all, s.dim, D, w.q);
    std::fill_n(w.sums, all * T, 0.0f);
    for (int i = 0; i < all; i += G) {
        w.bounded[i / G] = !s.mask && s.scale * 1.44269504f * std::sqrt(most_k * largest(w.q + i * D, D)) < SAFE;
        std::fill_n(w.shift + i, G, w.bounded[i / G] ? 0.0f : LOW);
    }
    for (int64_t key = 0; key < s.keys; key += KB) {
        const int64_t packed = std::min<int64_t>(KB, up(s.keys, G) - key);
        for (int i = 0; i < all; i += G) {
            const int64_t width = s.causal ? std::min(packed, first + i + G - key) : packed;  // a multiple of G
            (w.bounded[i / G] ? weigh<true> : weigh<false>)(s, w, b, h, first, i, key, width, K);
            for (int64_t e = 0; e < E && width > 0; e += 32) {
                const char* tiles = V + key * E * 2 + e * packed * 2;
                float* out = w.out + i * ldo + e;
                if (key) product<true>(w.probs, LDP, tiles, out, ldo, width / 32, [](int) {});
                else product<false>(w.probs, LDP, tiles, out, ldo, width / 32, [](int) {});  // sets what was there
            }
        }
    }
    const char* out = at(s.out, b * s.os[0] + h * s.os[1] + first * s.os[2], s.wide);
    for (int i = 0; i < rows; ++i) {
        const float sum = _mm512_reduce_add_ps(_mm512_loadu_ps(w.sums + i * T));
        const __m512 by = _mm512_set1_ps(sum > 0 ? 1 / sum : 0.0f);  // no key at all: zeros, as torch
        char* row = const_cast<char*>(at(out, i * s.os[2], s.wide));
        const float* from = w.out + i * ldo;
        for (int64_t e = 0; e < s.dim_v; e += 32)
            store_pair(row + e * (s.wide ? 4 : 2), s.wide, s.dim_v - e, false,
                       _mm512_mul_ps(_mm512_loadu_ps(from + e), by), _mm512_mul_ps(_mm512_loadu_ps(from + e + T), by));
    }
}

}  // namespace

extern "C" {

// Bytes of scratch that hasten_attention needs.
int64_t hasten_attention_scratch(const Attention* s) {
    const int64_t L = up(s->keys, 32);
    return s->batch * s->kv_heads * (L * (up(s->dim, 32) + up(s->dim_v, 32)) * 2 + L / 32 * 4) + 64;
}

void hasten_attention(const Attention* given, int threads) {
    const Attention& s = *given;
    const int64_t D = up(s.dim, 32), E = up(s.dim_v, 32), L = up(s.keys, 32), K_size = L * D * 2;
    const int64_t groups = s.batch * s.kv_heads, size = K_size + L * E * 2, tiles_of_head = L / 32;
    char* scratch = reinterpret_cast<char*>(up(reinterpret_cast<int64_t>(s.scratch), 64));
    float* most_k = reinterpret_cast<float*>(scratch + groups * size);
    // Blocks of equal size, as large as leaves every thread some: each reads all of its head's K and V.
    const int64_t heads = s.batch * s.heads, least = (s.queries + QB - 1) / QB, most = (s.queries + 63) / 64;
    const int64_t blocks = std::clamp((4 * threads + heads - 1) / heads, least, most);
    const int64_t rows = up((s.queries + blocks - 1) / blocks, G), tasks = (s.queries + rows - 1) / rows;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        static thread_local Work w;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * tiles_of_head; ++i) {  // heads in turn: those of a token lie side by side
            const int64_t h = i % s.kv_heads, b = i / s.kv_heads / tiles_of_head, g = b * s.kv_heads + h;
            const int64_t key = i / s.kv_heads % tiles_of_head * 32, first = key / KB * KB;
            char *K = scratch + g * size, *V = K + K_size + first * E * 2 + (key - first) * 64;
            most_k[g * tiles_of_head + key / 32] =
                pack(s, b, h, key, K + key * D * 2, V, std::min<int64_t>(KB, L - first) * 64);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * tasks; ++i) {
            const int64_t b = i / tasks / s.heads, h = i / tasks % s.heads, first = i % tasks * rows;
            const int64_t g = b * s.kv_heads + h / (s.heads / s.kv_heads);
            const float* all = most_k + g * tiles_of_head;
            attend(s, w, b, h, first, int(std::min(rows, s.queries - first)), scratch + g * size,
                   scratch + g * size + K_size, *std::max_element(all, all + tiles_of_head));
        }
    }
}

}
