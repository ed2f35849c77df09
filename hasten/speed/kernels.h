// What the CPU kernels share: tiles, loads and stores of either type, 2^x. They need AVX-512 BF16, and use AMX tiles
// where the compiler is told of them. Plain C functions, called through ctypes; no torch headers, so that building
// takes seconds.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;
constexpr int T = 16;  // rows of a tile, and float lanes of a register

#ifdef __AMX_BF16__
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = T;
    }
};
struct Tiles {  // a thread's tile registers, for as long as it lives
    Tiles() {
        static const TileConfig config;  // static: g++ 12 believes that 8 bytes are read, and drops a local's stores
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};
#else
struct Tiles {};
#endif

inline float to_float(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline __mmask16 lanes(int64_t n) { return n >= T ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }

// 16 values of row p from column i on, as floats; zeros past n.
inline __m512 load(const void* p, bool wide, int64_t i, int64_t n) {
    const __mmask16 m = lanes(n - i);
    if (wide) return _mm512_maskz_loadu_ps(m, static_cast<const float*>(p) + i);
    return widen(_mm256_maskz_loadu_epi16(m, static_cast<const bf16*>(p) + i));
}

inline void store(void* p, bool wide, int64_t i, int64_t n, __m512 v) {
    const __mmask16 m = lanes(n - i);
    if (wide) _mm512_mask_storeu_ps(static_cast<float*>(p) + i, m, v);
    else _mm256_mask_storeu_epi16(static_cast<bf16*>(p) + i, m, narrow(v));
}

// 32 values, of which the first n count. `past` writes around the cache, where whole lines allow it.
inline void store_pair(void* p, bool wide, int64_t n, bool past, __m512 x, __m512 y) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    if (wide) {
        store(p, true, 0, n, x);
        store(p, true, T, n, y);
    } else if (n >= 32) {
        if (past && reinterpret_cast<int64_t>(p) % 64 == 0) _mm512_stream_si512(static_cast<__m512i*>(p), both);
        else _mm512_storeu_si512(p, both);
    } else {
        _mm512_mask_storeu_epi16(p, (1u << n) - 1, both);
    }
}

// A 16 x 16 block of 32-bit words, transposed: rows of src are `stride` bytes apart, out is 1 KiB.
inline void transpose(const char* src, int64_t stride, int rows, __mmask16 words, char* out) {
    __m512i r[T], s[T];
    for (int i = 0; i < T; ++i)
        r[i] = i < rows ? _mm512_maskz_loadu_epi32(words, src + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < T; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < T; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {  // r[4 i + j] holds words 4 l + j of lane l of rows 4 i ..
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(out + 64 * j, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(out + 64 * (8 + j), _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(out + 64 * (4 + j), _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(out + 64 * (12 + j), _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline const char* at(const void* p, int64_t elements, bool wide) {
    return static_cast<const char*>(p) + elements * (wide ? 4 : 2);
}

// 2^t: t - floor(t) in [0, 1), a cubic with relative error 8e-5 (bfloat16 rounds at 2e-3), the exponent exactly.
inline __m512 exp2(__m512 t) {
    const __m512 f = _mm512_reduce_ps(t, 0x09);
    __m512 p = _mm512_set1_ps(0.07801918f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22606232f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69584214f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992367f));
    return _mm512_scalef_ps(p, t);
}

}  // namespace
