// The int8 linear: activations rounded with a scale per row, an int32 product, scales, bias and activation at once.

#include "kernels.h"

#ifdef __AMX_INT8__

namespace {

constexpr int64_t PAST = 1 << 19;  // outputs that would push the weights out of a core's L2, did they enter it

struct Linear {
    const void* x;
    const int8_t* weight;  // [outputs, inputs]
    const float *scale, *bias;
    void* out;
    char* scratch;
    int64_t rows, inputs, outputs, stride;  // stride of x in elements
    int32_t wide, gelu;                     // float32, else bfloat16; whether a GELU follows
};

// One row of x as int8 with the scale max|x| / 127, zeros up to `padded`; 64 values at a time, a tile apart.
float quantize(const Linear& s, int64_t row, int8_t* out, int64_t padded) {
    const char* x = at(s.x, row * s.stride, s.wide);
    const int64_t whole = s.inputs / 64 * 64;
    __m512 most = _mm512_set1_ps(1e-12f);
    if (s.wide) {
        for (int64_t j = 0; j < whole; j += T) most = _mm512_max_ps(most, _mm512_abs_ps(load(x, true, j, whole)));
    } else {  // without their sign, bfloat16 numbers are in the order of their bits
        __m512i top = _mm512_setzero_si512();
        const __m512i sign = _mm512_set1_epi16(0x7fff);
        for (int64_t j = 0; j < whole; j += 32)
            top = _mm512_max_epu16(top, _mm512_and_si512(sign, _mm512_loadu_si512(x + 2 * j)));
        most = _mm512_max_ps(most, _mm512_castsi512_ps(_mm512_slli_epi32(top, 16)));
        most = _mm512_max_ps(most, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_srli_epi32(top, 16), 16)));
    }
    for (int64_t j = whole; j < s.inputs; j += T)
        most = _mm512_max_ps(most, _mm512_abs_ps(load(x, s.wide, j, s.inputs)));
    const float scale = _mm512_reduce_max_ps(most) / 127;
    const __m512 by = _mm512_set1_ps(1 / scale);
    for (int64_t j = 0; j < padded; j += T) {
        const __m512 v = s.wide || j >= whole ? load(x, s.wide, j, s.inputs)
                                              : widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * j)));
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, by));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j / 64 * 1024 + j % 64), _mm512_cvtsepi32_epi8(q));
    }
    return scale;
}

// GELU by its tanh form, as x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3).
inline __m512 gelu(__m512 x) {
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
    const __m512 t = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-2.3022082f));  // -2 z / ln 2
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2(t)));
}

// Rows [row, row + 32) of the outputs [column, column + 32): a in 1 KiB tiles, b in 1 KiB tiles, two a step.
void panel(const Linear& s, const int8_t* a, const float* scales, const char* b, int64_t padded, int64_t row,
           int64_t column) {
    alignas(64) int32_t c[32][32];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < padded; k += 64) {
        _tile_loadd(4, a + k * T, 64);
        _tile_loadd(6, b + k * 32, 64);
        _tile_loadd(5, a + T * padded + k * T, 64);
        _tile_loadd(7, b + k * 32 + 1024, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, c[0], 128);
    _tile_stored(1, c[0] + T, 128);
    _tile_stored(2, c[T], 128);
    _tile_stored(3, c[T] + T, 128);
    const int64_t left = s.outputs - column;
    const bool past = s.rows * s.outputs >= PAST;
    const __mmask16 on = lanes(left), on2 = lanes(left - T);
    const __m512 scale = _mm512_maskz_loadu_ps(on, s.scale + column), bias = _mm512_maskz_loadu_ps(on, s.bias + column);
    const __m512 scale2 = _mm512_maskz_loadu_ps(on2, s.scale + column + T);
    const __m512 bias2 = _mm512_maskz_loadu_ps(on2, s.bias + column + T);
    char* out = const_cast<char*>(at(s.out, row * s.outputs + column, s.wide));
    for (int64_t i = 0; i < std::min<int64_t>(32, s.rows - row); ++i, out += s.outputs * (s.wide ? 4 : 2)) {
        const __m512 by = _mm512_set1_ps(scales[i]);
        const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(c[i])), by);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(c[i] + T)), by);
        const __m512 u = _mm512_fmadd_ps(x, scale, bias), v = _mm512_fmadd_ps(y, scale2, bias2);
        store_pair(out, s.wide, left, past, s.gelu ? gelu(u) : u, s.gelu ? gelu(v) : v);
    }
}

}  // namespace

extern "C" {

// Bytes of scratch that hasten_int8_linear needs: x as int8, its scales, a panel of the weight for each thread.
int64_t hasten_int8_linear_scratch(const Linear* s, int threads) {
    return up(s->rows, 32) * (up(s->inputs, 64) + 4) + threads * 32 * up(s->inputs, 64) + 64;
}

void hasten_int8_linear(const Linear* given, int threads) {
    const Linear& s = *given;
    const int64_t K = up(s.inputs, 64), M = up(s.rows, 32), panels = (s.outputs + 31) / 32;
    // Enough pieces for every thread, none so short that packing its panel of the weight counts.
    const int64_t chunk = std::max<int64_t>(256, up(M / std::max<int64_t>(1, 4 * threads / panels), 32));
    const int64_t chunks = (M + chunk - 1) / chunk;
    char* tiles_of = reinterpret_cast<char*>(up(reinterpret_cast<int64_t>(s.scratch), 64));
    int8_t* x = reinterpret_cast<int8_t*>(tiles_of + threads * 32 * K);
    float* scales = reinterpret_cast<float*>(x + M * K);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        char* b = tiles_of + omp_get_thread_num() * 32 * K;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < M; ++i) {
            if (i < s.rows) scales[i] = quantize(s, i, x + i / T * T * K + i % T * 64, K);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < panels * chunks; ++item) {
            const int64_t column = item / chunks * 32, first = item % chunks * chunk;
            for (int64_t k = 0; k < K; k += 64)
                for (int64_t g = 0; g < 32; g += T)
                    transpose(reinterpret_cast<const char*>(s.weight) + (column + g) * s.inputs + k, s.inputs,
                              int(std::clamp<int64_t>(s.outputs - column - g, 0, T)), lanes((s.inputs - k) / 4),
                              b + k * 32 + g * 64);
            for (int64_t row = first; row < std::min(M, first + chunk); row += 32)
                panel(s, x + row * K, scales + row, b, K, row, column);
        }
    }
}

}

#endif
