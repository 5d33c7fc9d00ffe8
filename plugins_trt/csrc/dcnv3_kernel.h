// DCNv3 for one thread: V channels of one group at one output pixel. The same code is a CUDA kernel and a C++ function.
//
// The formula is that of deploycc/core/dcnv3.py. What is particular to this kernel:
//  - Offsets, masks and bilinear weights are computed once for V channels.
//  - Positions are FP32 and split before they meet the pixel's own coordinate: base + floor(d) and d - floor(d), so that their
//    accuracy does not fall with the size of the image.
//  - Borders have no branch: a neighbour outside gets weight zero and the address of the nearest pixel inside. An infinite or NaN
//    value at the border therefore reaches samples just outside, unlike in a kernel that skips it.
//  - A displacement that is not a number, or beyond the image, is clamped before it becomes an integer: no offset makes an address
//    outside the image, and such samples are zero.
//  - The flat index of (n, y, x, group, block) is 64 bits wide; what it splits into is checked to fit 31 bits.
#pragma once

#include "dcnv3_numbers.h"

namespace deploycc {

// What one launch computes; pointers are to device or host memory alike. See `Problem::Make` in dcnv3_problem.h.
struct Problem {
    const void* x;       // [N, H, W, C]
    const void* offset;  // per pixel and group 2 K numbers, `offset_row` apart
    const void* mask;    // per pixel and group K numbers from `mask_start` on, `mask_row` apart
    const void* center;  // [N, Ho, Wo, G] in the type of x, or null
    void* y;             // [N, Ho, Wo, C]
    std::int64_t items;  // threads with work
    std::int64_t items_per_image;
    std::int64_t image_elements;  // H W C
    Divisor blocks, groups, columns, rows;
    std::int32_t height, width, channels, channels_per_group;
    std::int32_t offset_row, mask_row, mask_start;
    std::int32_t kernel_h, kernel_w, points, skipped;  // `skipped` is the index of a removed centre, or K
    std::int32_t stride_h, stride_w, dilation_h, dilation_w;
    std::int32_t first_h, first_w;  // floor(dilation (kernel - 1) / 2) - pad
    std::int32_t reach_h, reach_w;  // floor(dilation (kernel - 1) / 2)
    std::int32_t softmax, y_is_int8;
    float offset_scale, x_scale, y_factor;
};

// A vector of V numbers, loaded in pieces of at most 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
    static constexpr int bytes = sizeof(T) * V;
    T values[V];

    DC_INLINE void load(const void* from) {
#if DC_ON_DEVICE
        if constexpr (bytes >= 16) {
            for (int i = 0; i < bytes / 16; ++i) {
                reinterpret_cast<uint4*>(values)[i] = __ldg(static_cast<const uint4*>(from) + i);
            }
        } else if constexpr (bytes == 8) {
            *reinterpret_cast<uint2*>(values) = __ldg(static_cast<const uint2*>(from));
        } else if constexpr (bytes == 4) {
            *reinterpret_cast<unsigned*>(values) = __ldg(static_cast<const unsigned*>(from));
        } else if constexpr (bytes == 2) {
            *reinterpret_cast<unsigned short*>(values) = __ldg(static_cast<const unsigned short*>(from));
        } else {
            *reinterpret_cast<unsigned char*>(values) = __ldg(static_cast<const unsigned char*>(from));
        }
#else
        memcpy(values, from, sizeof(values));
#endif
    }

    DC_INLINE void store(void* to) const {
#if DC_ON_DEVICE
        *static_cast<Vector*>(to) = *this;
#else
        memcpy(to, values, sizeof(values));
#endif
    }

    // 32 bits of the vector, from element `i` on.
    DC_INLINE std::uint32_t word(int i) const {
        std::uint32_t found;
        memcpy(&found, values + i, sizeof(found));
        return found;
    }
};

template <class T>
DC_INLINE float read(const void* from, std::int64_t index) {
    Vector<T, 1> one;
    one.load(static_cast<const T*>(from) + index);
    return to_float(one.values[0]);
}

// The offsets and masks of one pixel and group, read one by one.
template <class O, class M>
struct Operands {
    const O* offsets;
    const M* masks;

    DC_INLINE Operands(const Problem& p, std::int64_t pixel_group)
        : offsets(static_cast<const O*>(p.offset) + pixel_group * p.offset_row),
          masks(static_cast<const M*>(p.mask) + pixel_group * p.mask_row + p.mask_start) {}

    DC_INLINE void offset(int k, float& dx, float& dy) const {
        Vector<O, 2> both;
        both.load(offsets + 2 * k);
        dx = to_float(both.values[0]);
        dy = to_float(both.values[1]);
    }

    DC_INLINE float mask(int k) const { return read<M>(masks, k); }
};

// A record of 32 halves, 18 offsets and 9 masks and padding, read in four vectors.
struct Record {
    Vector<Half, 32> values;

    DC_INLINE Record(const Problem& p, std::int64_t pixel_group) { values.load(static_cast<const Half*>(p.offset) + pixel_group * 32); }

    DC_INLINE void offset(int k, float& dx, float& dy) const {
        dx = to_float(values.values[2 * k]);
        dy = to_float(values.values[2 * k + 1]);
    }

    DC_INLINE float mask(int k) const { return to_float(values.values[18 + k]); }
};

// The four neighbours of one sample: their weights, and their pixels in the image.
struct Corners {
    float weights[4];
    std::uint32_t pixels[4];
};

DC_INLINE void split_axis(float d, int base, int size, float (&weights)[2], int (&places)[2]) {
    const auto from = static_cast<float>(base);
    const float near = smallest(largest(d, -2.0f - from), static_cast<float>(size + 1) - from);
    float fraction;
    const int first = base + floor_of(near, fraction);
    const int second = first + 1;
    weights[0] = static_cast<unsigned>(first) < static_cast<unsigned>(size) ? 1.0f - fraction : 0.0f;
    weights[1] = static_cast<unsigned>(second) < static_cast<unsigned>(size) ? fraction : 0.0f;
    places[0] = clamped(first, 0, size - 1);
    places[1] = clamped(second, 0, size - 1);
}

DC_INLINE Corners corners_of(const Problem& p, int base_y, int base_x, float dy, float dx) {
    float wy[2], wx[2];
    int y[2], x[2];
    split_axis(dy, base_y, p.height, wy, y);
    split_axis(dx, base_x, p.width, wx, x);
    Corners found;
    for (int i = 0; i < 4; ++i) {
        found.weights[i] = wy[i / 2] * wx[i % 2];
        found.pixels[i] = static_cast<std::uint32_t>(y[i / 2] * p.width + x[i % 2]);
    }
    return found;
}

// Interpolation in FP32: sum += mask (w0 x0 + w1 x1 + w2 x2 + w3 x3).
struct Exact {
    template <class X, int V>
    DC_INLINE static void add(const Vector<X, V> (&x)[4], const Corners& at, float mask, float (&sum)[V]) {
        for (int i = 0; i < 4; ++i) {
            const float weight = at.weights[i] * mask;
            for (int v = 0; v < V; ++v) {
                sum[v] += weight * value(x[i], v);
            }
        }
    }

    template <class X, int V>
    DC_INLINE static float value(const Vector<X, V>& x, int v) {
        return to_float(x.values[v]);
    }

    template <int V>
    DC_INLINE static float value(const Vector<std::int8_t, V>& x, int v) {
        if constexpr (V % 4 == 0) {
            Pair pairs[2];
            pairs_of_codes(x.word(v / 4 * 4), pairs[0], pairs[1]);
            return v % 2 ? high(pairs[v % 4 / 2]) : low(pairs[v % 4 / 2]);
        } else {
            return to_float(x.values[v]);
        }
    }
};

// Interpolation of pairs in FP16, summed in FP32: one rounding of 2^-11 per corner.
struct Paired {
    template <class X, int V>
    DC_INLINE static void add(const Vector<X, V> (&x)[4], const Corners& at, float mask, float (&sum)[V]) {
        Pair weights[4];
        for (int i = 0; i < 4; ++i) {
            weights[i] = pair_of(at.weights[i]);
        }
        for (int v = 0; v < V; v += 2) {
            Pair mixed = multiply(weights[0], pair(x[0], v));
            for (int i = 1; i < 4; ++i) {
                mixed = multiply_add(weights[i], pair(x[i], v), mixed);
            }
            sum[v] += mask * low(mixed);
            sum[v + 1] += mask * high(mixed);
        }
    }

    template <int V>
    DC_INLINE static Pair pair(const Vector<Half, V>& x, int v) {
        return pair_from_bits(x.word(v));
    }

    template <int V>
    DC_INLINE static Pair pair(const Vector<std::int8_t, V>& x, int v) {
        Pair pairs[2];
        if constexpr (V % 4 == 0) {
            pairs_of_codes(x.word(v / 4 * 4), pairs[0], pairs[1]);
            return pairs[v % 4 / 2];
        } else {
            std::uint16_t codes;
            memcpy(&codes, x.values + v, sizeof(codes));
            pairs_of_codes(codes, pairs[0], pairs[1]);
            return pairs[0];
        }
    }
};

// The masks of all kernel points, through a softmax if the problem asks for one.
template <class Source>
struct Weights {
    const Source& source;
    float shift = 0.0f, factor = 1.0f;
    bool softmax;

    DC_INLINE Weights(const Problem& p, const Source& source, int points) : source(source), softmax(p.softmax != 0) {
        if (softmax) {
            shift = source.mask(0);
            for (int k = 1; k < points; ++k) {
                shift = largest(shift, source.mask(k));
            }
            float total = 0.0f;
            for (int k = 0; k < points; ++k) {
                total += grown(k);
            }
            factor = reciprocal(total);
        }
    }

    DC_INLINE float grown(int k) const { return power_of_two((source.mask(k) - shift) * kLog2OfE); }

    DC_INLINE float operator[](int k) const { return softmax ? grown(k) * factor : source.mask(k); }
};

// The same with the number of points known: computed once, kept in registers.
template <class Source, int K>
struct KnownWeights {
    float weights[K];

    DC_INLINE KnownWeights(const Problem& p, const Source& source, int) {
        for (int k = 0; k < K; ++k) {
            weights[k] = source.mask(k);
        }
        if (p.softmax) {
            float shift = weights[0], total = 0.0f;
            for (int k = 1; k < K; ++k) {
                shift = largest(shift, weights[k]);
            }
            for (int k = 0; k < K; ++k) {
                weights[k] = power_of_two((weights[k] - shift) * kLog2OfE);
                total += weights[k];
            }
            const float factor = reciprocal(total);
            for (int k = 0; k < K; ++k) {
                weights[k] *= factor;
            }
        }
    }

    DC_INLINE float operator[](int k) const { return weights[k]; }
};

template <class Source, int Kernel>
struct WeightsOf {
    using Type = KnownWeights<Source, Kernel * Kernel>;
};

template <class Source>
struct WeightsOf<Source, 0> {
    using Type = Weights<Source>;
};

template <class Y, int V>
DC_INLINE void store(void* y, std::int64_t out, const float (&sum)[V], float factor) {
    Vector<Y, V> result;
    for (int v = 0; v < V; ++v) {
        result.values[v] = from_float<Y>(sum[v] * factor);
    }
    result.store(static_cast<Y*>(y) + out);
}

// The result has the type of x, except that INT8 x gives FP16 or INT8.
template <class X, int V>
struct Finish {
    DC_INLINE static void run(const Problem& p, std::int64_t out, const float (&sum)[V]) { store<X, V>(p.y, out, sum, 1.0f); }
};

template <int V>
struct Finish<std::int8_t, V> {
    DC_INLINE static void run(const Problem& p, std::int64_t out, const float (&sum)[V]) {
        if (p.y_is_int8) {
            store<std::int8_t, V>(p.y, out, sum, p.x_scale * p.y_factor);
        } else {
            store<Half, V>(p.y, out, sum, p.x_scale);
        }
    }
};

// Compute item `item` of the problem. `Kernel` is the side of a full square kernel known to the compiler, or 0 for any other.
template <class X, class Source, class Math, int V, int Kernel>
DC_INLINE void compute(const Problem& p, std::int64_t item) {
    std::int64_t image = 0;
    if (p.items > 0x7fffffff) {
        image = item / p.items_per_image;
        item -= image * p.items_per_image;
    }
    auto block = static_cast<std::uint32_t>(item);
    auto group = p.blocks.split(block);
    auto column = p.groups.split(group);
    auto row = p.columns.split(column);
    image += p.rows.split(row);
    const std::int64_t pixel = (image * p.rows.divisor + row) * p.columns.divisor + column;
    const std::int64_t pixel_group = pixel * p.groups.divisor + group;
    const std::int32_t channel = static_cast<std::int32_t>(group) * p.channels_per_group + static_cast<std::int32_t>(block) * V;
    const auto* values = reinterpret_cast<const char*>(static_cast<const X*>(p.x) + image * p.image_elements + channel);
    const auto stride = static_cast<std::uint32_t>(p.channels * static_cast<int>(sizeof(X)));
    const int base_y = p.first_h + static_cast<int>(row) * p.stride_h;
    const int base_x = p.first_w + static_cast<int>(column) * p.stride_w;

    const Source source(p, pixel_group);
    const typename WeightsOf<Source, Kernel>::Type weights(p, source, p.points);
    float sum[V] = {};
    const int kernel_w = Kernel ? Kernel : p.kernel_w, kernel_h = Kernel ? Kernel : p.kernel_h;
    DC_UNROLL
    for (int i = 0; i < kernel_w; ++i) {
        const float kx = static_cast<float>(i * p.dilation_w - p.reach_w) * p.offset_scale;
        DC_UNROLL
        for (int j = 0; j < kernel_h; ++j) {
            int k = i * kernel_h + j;
            if (!Kernel) {
                if (k == p.skipped) {
                    continue;
                }
                k -= k > p.skipped;
            }
            const float ky = static_cast<float>(j * p.dilation_h - p.reach_h) * p.offset_scale;
            float dx, dy;
            source.offset(k, dx, dy);
            const Corners at = corners_of(p, base_y, base_x, ky + dy * p.offset_scale, kx + dx * p.offset_scale);
            Vector<X, V> x[4];
            for (int c = 0; c < 4; ++c) {
                x[c].load(values + std::uint64_t{at.pixels[c]} * stride);
            }
            Math::add(x, at, weights[k], sum);
        }
    }

    const std::int64_t out = pixel * p.channels + channel;
    if (p.center) {
        const float share = read<X>(p.center, pixel_group);
        Vector<X, V> own;
        own.load(static_cast<const X*>(p.x) + out);
        for (int v = 0; v < V; ++v) {
            sum[v] = sum[v] * (1.0f - share) + to_float(own.values[v]) * share;
        }
    }
    Finish<X, V>::run(p, out, sum);
}

}  // namespace deploycc
