// Rotary embedding of adjacent channels, after a norm of each head where there is one, in one pass over memory.

#include "kernels.h"

namespace {

struct Rotate {
    const void *x, *weight;  // [A, B, C, dim], channels next to each other; [dim] or null
    void* out;               // [A, B, C, dim]
    const float *cos, *sin;  // [A, B, C, dim], where a stride of 0 repeats
    int64_t size[3], dim, xs[3], os[3], cs[3], ss[3];
    float eps;                       // of the norm
    int32_t norm, wide, wide_weight;  // float32, else bfloat16
};

// One head: x over its root mean square and times the weight; then x cos + (-x1, x0, -x3, x2 ...) sin.
inline void rotate(const Rotate& s, const char* x, char* out, const float* cos, const float* sin) {
    __m512 by = _mm512_set1_ps(1);
    if (s.norm) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < s.dim; j += T) {
            const __m512 v = load(x, s.wide, j, s.dim);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        by = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / float(s.dim) + s.eps));
    }
    for (int64_t j = 0; j < s.dim; j += T) {
        __m512 v = _mm512_mul_ps(load(x, s.wide, j, s.dim), by);
        if (s.weight) v = _mm512_mul_ps(v, load(s.weight, s.wide_weight, j, s.dim));
        const __m512 turned = _mm512_mul_ps(_mm512_permute_ps(v, 0xb1), load(sin, true, j, s.dim));
        store(out, s.wide, j, s.dim, _mm512_fmaddsub_ps(v, load(cos, true, j, s.dim), turned));
    }
}

}  // namespace

extern "C" void hasten_rotate(const Rotate* given, int threads) {
    const Rotate& s = *given;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < s.size[0] * s.size[1]; ++row) {
        const int64_t a = row / s.size[1], b = row % s.size[1];
        auto place = [&](const int64_t* stride, int64_t c) { return a * stride[0] + b * stride[1] + c * stride[2]; };
        for (int64_t c = 0; c < s.size[2]; ++c)
            rotate(s, at(s.x, place(s.xs, c), s.wide), const_cast<char*>(at(s.out, place(s.os, c), s.wide)),
                   s.cos + place(s.cs, c), s.sin + place(s.ss, c));
    }
}
