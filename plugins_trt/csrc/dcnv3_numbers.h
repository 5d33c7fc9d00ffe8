// The number types of the DCNv3 kernel, with the same names and results in nvcc and in g++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define DC_INLINE __host__ __device__ __forceinline__
#else
#define DC_INLINE inline
#endif

#if defined(__CUDA_ARCH__)
#define DC_ON_DEVICE 1
#define DC_UNROLL _Pragma("unroll")
#else
#define DC_ON_DEVICE 0
#define DC_UNROLL
#endif

namespace deploycc {

struct Half {
    std::uint16_t bits;
};

struct Bfloat16 {
    std::uint16_t bits;
};

template <class To, class From>
DC_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "only equal sizes can be reinterpreted");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// Conversions to FP32 are exact, those from it round to the nearest, ties to even.

DC_INLINE float to_float(float value) { return value; }

DC_INLINE float to_float(std::int8_t value) { return static_cast<float>(value); }

DC_INLINE float to_float(Bfloat16 value) { return bits_as<float>(static_cast<std::uint32_t>(value.bits) << 16); }

DC_INLINE float to_float(Half value) {
#if DC_ON_DEVICE
    return __half2float(__ushort_as_half(value.bits));
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t rest = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
    if ((value.bits & 0x7c00u) == 0x7c00u) {
        return bits_as<float>(sign | rest | 0x7f800000u);
    }
    // Read with the exponent of float, the number is 2^112 times too small; subnormals come out right as well.
    return bits_as<float>(sign | bits_as<std::uint32_t>(bits_as<float>(rest) * 0x1p112f));
#endif
}

template <class T>
DC_INLINE T from_float(float value);

template <>
DC_INLINE float from_float<float>(float value) {
    return value;
}

template <>
DC_INLINE Bfloat16 from_float<Bfloat16>(float value) {
    const auto bits = bits_as<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
DC_INLINE Half from_float<Half>(float value) {
#if DC_ON_DEVICE
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const auto bits = bits_as<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const float magnitude = bits_as<float>(bits & 0x7fffffffu);
    if (!(magnitude < 65520.0f)) {  // rounds to infinity, is infinite, or is not a number
        return {static_cast<std::uint16_t>(sign | (magnitude != magnitude ? 0x7e00u : 0x7c00u))};
    }
    if (magnitude < 0x1p-14f) {  // subnormal: the steps are 2^-24, and adding 0.5 lets the FPU round to them
        const auto code = static_cast<std::uint16_t>(bits_as<std::uint32_t>(magnitude + 0.5f) - bits_as<std::uint32_t>(0.5f));
        return {static_cast<std::uint16_t>(sign | code)};
    }
    const auto wide = bits_as<std::uint32_t>(magnitude) - (112u << 23);
    return {static_cast<std::uint16_t>(sign | ((wide + 0xfffu + ((wide >> 13) & 1u)) >> 13))};
#endif
}

template <>
DC_INLINE std::int8_t from_float<std::int8_t>(float value) {
#if DC_ON_DEVICE
    return static_cast<std::int8_t>(max(-128, min(127, __float2int_rn(value))));
#else
    return static_cast<std::int8_t>(std::nearbyint(std::fmin(std::fmax(value, -128.0f), 127.0f)));
#endif
}

// Two numbers in FP16 arithmetic; each operation rounds once.

#if DC_ON_DEVICE
using Pair = __half2;

DC_INLINE Pair pair_of(float value) { return __float2half2_rn(value); }
DC_INLINE Pair pair_from_bits(std::uint32_t bits) { return bits_as<__half2>(bits); }
DC_INLINE Pair multiply(Pair a, Pair b) { return __hmul2(a, b); }
DC_INLINE Pair multiply_add(Pair a, Pair b, Pair c) { return __hfma2(a, b, c); }
DC_INLINE float low(Pair value) { return __low2float(value); }
DC_INLINE float high(Pair value) { return __high2float(value); }
#else
struct Pair {
    float low, high;
};

DC_INLINE float rounded_to_half(float value) { return to_float(from_float<Half>(value)); }
DC_INLINE Pair pair_of(float value) { return {rounded_to_half(value), rounded_to_half(value)}; }
DC_INLINE Pair pair_from_bits(std::uint32_t bits) {
    return {to_float(Half{static_cast<std::uint16_t>(bits)}), to_float(Half{static_cast<std::uint16_t>(bits >> 16)})};
}
DC_INLINE Pair multiply(Pair a, Pair b) { return {rounded_to_half(a.low * b.low), rounded_to_half(a.high * b.high)}; }
DC_INLINE Pair multiply_add(Pair a, Pair b, Pair c) {
    return {rounded_to_half(std::fmaf(a.low, b.low, c.low)), rounded_to_half(std::fmaf(a.high, b.high, c.high))};
}
DC_INLINE float low(Pair value) { return value.low; }
DC_INLINE float high(Pair value) { return value.high; }
#endif

// Four codes of INT8 as two pairs, exactly: 0x6400 | (code + 128) is the FP16 number 1152 + code.
DC_INLINE void pairs_of_codes(std::uint32_t codes, Pair& first, Pair& second) {
#if DC_ON_DEVICE
    const std::uint32_t positive = codes ^ 0x80808080u;
    const Pair bias = __float2half2_rn(1152.0f);
    first = __hsub2(pair_from_bits(__byte_perm(positive, 0x64646464u, 0x4140)), bias);
    second = __hsub2(pair_from_bits(__byte_perm(positive, 0x64646464u, 0x4342)), bias);
#else
    const auto code = [codes](int index) { return to_float(static_cast<std::int8_t>(codes >> (8 * index))); };
    first = {code(0), code(1)};
    second = {code(2), code(3)};
#endif
}

DC_INLINE float smallest(float a, float b) {
#if DC_ON_DEVICE
    return fminf(a, b);
#else
    return std::fmin(a, b);
#endif
}

// The larger of two, and the other one where one is not a number.
DC_INLINE float largest(float a, float b) {
#if DC_ON_DEVICE
    return fmaxf(a, b);
#else
    return std::fmax(a, b);
#endif
}

// e^value, the argument given in units of ln 2 on a device: one instruction there, with a relative error of 2^-22.
constexpr float kLog2OfE = 1.4426950408889634f;

DC_INLINE float power_of_two(float value) {
#if DC_ON_DEVICE
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return std::exp2(value);
#endif
}

DC_INLINE float reciprocal(float value) {
#if DC_ON_DEVICE
    return __fdividef(1.0f, value);
#else
    return 1.0f / value;
#endif
}

// Split |value| < 2^22 into its floor and the fraction above it; no slow conversion instruction is needed.
DC_INLINE int floor_of(float value, float& fraction) {
#if DC_ON_DEVICE
    const float magic = 12582912.0f;  // 1.5 2^23: the low bits of the sum are the integer
    const float sum = __fadd_rd(value, magic);
    fraction = value - (sum - magic);
    return __float_as_int(sum) - 0x4b400000;
#else
    const float whole = std::floor(value);
    fraction = value - whole;
    return static_cast<int>(whole);
#endif
}

DC_INLINE int clamped(int value, int low, int high) {
#if DC_ON_DEVICE
    return min(max(value, low), high);
#else
    return value < low ? low : value > high ? high : value;
#endif
}

// A divisor known on the host: quotients of 31-bit numbers by one multiplication and one shift.
struct Divisor {
    std::uint32_t divisor, factor, shift;

    DC_INLINE static constexpr Divisor of(std::int64_t number) {
        Divisor made{static_cast<std::uint32_t>(number), 0, 0};
        while ((std::int64_t{1} << made.shift) < number) {
            ++made.shift;
        }
        const std::uint64_t power = std::uint64_t{1} << (31 + made.shift);
        made.factor = static_cast<std::uint32_t>((power + made.divisor - 1) / made.divisor);
        return made;
    }

    // Return the quotient and leave the remainder in `number`, which is below 2^31.
    DC_INLINE std::uint32_t split(std::uint32_t& number) const {
        // The quotient is number factor / 2^(31 + shift); twice the number keeps the high word of the product.
#if DC_ON_DEVICE
        const std::uint32_t quotient = __umulhi(2u * number, factor) >> shift;
#else
        const std::uint32_t quotient = static_cast<std::uint32_t>((std::uint64_t{2u * number} * factor) >> 32) >> shift;
#endif
        number -= quotient * divisor;
        return quotient;
    }
};

}  // namespace deploycc
