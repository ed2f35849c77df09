// Int8 linears of one input: activations rounded with a scale per row, int32 products, scales, bias, activation at once.

#include "kernels.h"

#ifdef __AMX_INT8__

namespace {

constexpr int64_t NEAR = 640 << 10;  // bytes of rounded input that a core's L2 keeps beside the weights
constexpr int64_t PAST = 1 << 20;  // outputs that would push the weights out of a core's L2, did they enter it

struct Linear {  // of one input and one weight
    const void* x;
    const int8_t* weight;  // [outputs, inputs]
    const float *scale, *bias;
    void* out;
    char* scratch;
    int64_t rows, inputs, outputs, stride;  // stride of x in elements
    int32_t wide, gelu;                     // float32, else bfloat16; whether a GELU follows
};
struct Source {  // columns of the input
    const void* x;
    int64_t inputs, stride;  // a multiple of 64, but for the last source
};
struct Target {
    const int8_t* weight;  // [outputs, the inputs of all sources]
    const float *scale, *bias;
    void* out;
    int64_t outputs, gelu;
};
struct Linears {
    const Source* sources;
    const Target* targets;
    char* scratch;
    int64_t n_sources, n_targets, rows, wide;

    int64_t inputs() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < n_sources; ++i) sum += sources[i].inputs;
        return sum;
    }
};

// The largest |x| of one row of a source.
__m512 largest(const Source& s, const char* x, bool wide, __m512 most) {
    const int64_t whole = s.inputs / 64 * 64;
    if (wide) {
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
        most = _mm512_max_ps(most, _mm512_abs_ps(load(x, wide, j, s.inputs)));
    return most;
}

// One row of all sources as int8 with the scale max|x| / 127, zeros up to a whole tile; 64 values, a tile apart.
float quantize(const Linears& s, int64_t row, int8_t* out) {
    __m512 most = _mm512_set1_ps(1e-12f);
    for (int64_t i = 0; i < s.n_sources; ++i)
        most = largest(s.sources[i], at(s.sources[i].x, row * s.sources[i].stride, s.wide), s.wide, most);
    const float scale = _mm512_reduce_max_ps(most) / 127;
    const __m512 by = _mm512_set1_ps(1 / scale);
    for (int64_t i = 0; i < s.n_sources; ++i) {
        const Source& from = s.sources[i];
        const char* x = at(from.x, row * from.stride, s.wide);
        const int64_t whole = from.inputs / 64 * 64, padded = up(from.inputs, 64);
        for (int64_t j = 0; j < padded; j += T) {
            const __m512 v = s.wide || j >= whole
                                 ? load(x, s.wide, j, from.inputs)
                                 : widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * j)));
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, by));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j / 64 * 1024 + j % 64), _mm512_cvtsepi32_epi8(q));
        }
        out += padded * T;
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
void panel(const Target& s, int64_t rows, bool wide, const int8_t* a, const float* scales, const char* b,
           int64_t padded, int64_t row, int64_t column) {
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
    const bool past = rows * s.outputs >= PAST;
    const __mmask16 on = lanes(left), on2 = lanes(left - T);
    const __m512 scale = _mm512_maskz_loadu_ps(on, s.scale + column), bias = _mm512_maskz_loadu_ps(on, s.bias + column);
    const __m512 scale2 = _mm512_maskz_loadu_ps(on2, s.scale + column + T);
    const __m512 bias2 = _mm512_maskz_loadu_ps(on2, s.bias + column + T);
    char* out = const_cast<char*>(at(s.out, row * s.outputs + column, wide));
    for (int64_t i = 0; i < std::min<int64_t>(32, rows - row); ++i, out += s.outputs * (wide ? 4 : 2)) {
        const __m512 by = _mm512_set1_ps(scales[i]);
        const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(c[i])), by);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(c[i] + T)), by);
        const __m512 u = _mm512_fmadd_ps(x, scale, bias), v = _mm512_fmadd_ps(y, scale2, bias2);
        store_pair(out, wide, left, past, s.gelu ? gelu(u) : u, s.gelu ? gelu(v) : v);
    }
}

}  // namespace

extern "C" {

// Bytes of scratch that hasten_int8_linears needs: x as int8, its scales, a panel of a weight for each thread.
int64_t hasten_int8_linears_scratch(const Linears* s, int threads) {
    const int64_t K = up(s->inputs(), 64);
    return up(s->rows, 32) * (K + 4) + threads * 32 * K + 64;
}

void hasten_int8_linears(const Linears* given, int threads) {
    const Linears& s = *given;
    const int64_t inputs = s.inputs(), K = up(inputs, 64), M = up(s.rows, 32);
    int64_t panels = 0;
    for (int64_t i = 0; i < s.n_targets; ++i) panels += (s.targets[i].outputs + 31) / 32;
    // Enough pieces for every thread, whose rows stay in a core's L2 under all panels, none so short that packing a
    // panel of the weight counts.
    const int64_t pieces = std::max((M * K + NEAR - 1) / NEAR, 4 * threads / panels);
    const int64_t chunk = std::max<int64_t>(128, up(M / std::max<int64_t>(1, pieces), 32));
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
            if (i < s.rows) scales[i] = quantize(s, i, x + i / T * T * K + i % T * 64);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < panels * chunks; ++item) {
            const Target* to = s.targets;
            int64_t column = item % panels * 32;
            for (; column >= up(to->outputs, 32); ++to) column -= up(to->outputs, 32);
            const int64_t first = item / panels * chunk;
            for (int64_t k = 0; k < K; k += 64)
                for (int64_t g = 0; g < 32; g += T)
                    transpose(reinterpret_cast<const char*>(to->weight) + (column + g) * inputs + k, inputs,
                              int(std::clamp<int64_t>(to->outputs - column - g, 0, T)), lanes((inputs - k) / 4),
                              b + k * 32 + g * 64);
            for (int64_t row = first; row < std::min(M, first + chunk); row += 32)
                panel(*to, s.rows, s.wide, x + row * K, scales + row, b, K, row, column);
        }
    }
}

// The same for one input and one weight.
int64_t hasten_int8_linear_scratch(const Linear* s, int threads) {
    const Source from{s->x, s->inputs, s->stride};
    const Linears all{&from, nullptr, nullptr, 1, 0, s->rows, s->wide};
    return hasten_int8_linears_scratch(&all, threads);
}

void hasten_int8_linear(const Linear* s, int threads) {
    const Source from{s->x, s->inputs, s->stride};
    const Target to{s->weight, s->scale, s->bias, s->out, s->outputs, s->gelu};
    const Linears all{&from, &to, s->scratch, 1, 1, s->rows, s->wide};
    hasten_int8_linears(&all, threads);
}

}

#endif
