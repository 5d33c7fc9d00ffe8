// From attributes, shapes and types to a launch: what is checked, which kernels exist, and which one runs.
#pragma once

#include <limits>
#include <string>
#include <type_traits>

#include "dcnv3_kernel.h"

namespace deploycc {

enum class Type : std::int32_t { kFloat, kHalf, kBfloat16, kInt8 };

inline int size_of(Type type) { return type == Type::kFloat ? 4 : type == Type::kInt8 ? 1 : 2; }

// The attributes of the node, in its names.
struct Attributes {
    std::int32_t group = 0, kernel_h = 3, kernel_w = 3, stride_h = 1, stride_w = 1, pad_h = 1, pad_w = 1, dilation_h = 1, dilation_w = 1;
    float offset_scale = 1.0f;
    std::int32_t remove_center = 0, softmax = 0, record = 0;
    float x_scale = 1.0f, y_scale = 1.0f;

    // Call `see(name, member)` for each attribute, in the order of serialisation.
    template <class Self, class See>
    static void each(Self& self, See see) {
        see("group", self.group);
        see("kernel_h", self.kernel_h);
        see("kernel_w", self.kernel_w);
        see("stride_h", self.stride_h);
        see("stride_w", self.stride_w);
        see("pad_h", self.pad_h);
        see("pad_w", self.pad_w);
        see("dilation_h", self.dilation_h);
        see("dilation_w", self.dilation_w);
        see("offset_scale", self.offset_scale);
        see("remove_center", self.remove_center);
        see("softmax", self.softmax);
        see("record", self.record);
        see("x_scale", self.x_scale);
        see("y_scale", self.y_scale);
    }

    int points() const { return kernel_h * kernel_w - remove_center; }

    // Return what is wrong, or nothing.
    std::string error() const {
        constexpr std::int32_t most = 1 << 10;
        std::string found;
        const auto bounded = [&found](const char* name, std::int32_t value, std::int32_t least, std::int32_t limit) {
            if (value < least || value > limit) {
                found = std::string(name) + " is " + std::to_string(value) + ", give " + std::to_string(least) + " to " + std::to_string(limit);
            }
        };
        bounded("group", group, 1, 1 << 16);
        bounded("kernel_h", kernel_h, 1, most);
        bounded("kernel_w", kernel_w, 1, most);
        bounded("stride_h", stride_h, 1, most);
        bounded("stride_w", stride_w, 1, most);
        bounded("pad_h", pad_h, 0, most);
        bounded("pad_w", pad_w, 0, most);
        bounded("dilation_h", dilation_h, 1, most);
        bounded("dilation_w", dilation_w, 1, most);
        bounded("remove_center", remove_center, 0, 1);
        bounded("softmax", softmax, 0, 1);
        bounded("record", record, 0, 1);
        if (found.empty() && remove_center && (kernel_h != kernel_w || kernel_h % 2 == 0 || kernel_h == 1)) {
            found = "remove_center needs an odd square kernel above 1, not " + std::to_string(kernel_h) + "x" + std::to_string(kernel_w);
        }
        // Written so that NaN fails as well.
        if (found.empty() && !(x_scale > 0.0f && y_scale > 0.0f && offset_scale > 0.0f && x_scale < 1e30f && offset_scale < 1e30f)) {
            found = "offset_scale, x_scale and y_scale must be positive and finite";
        }
        return found;
    }
};

struct Operand {
    void* data = nullptr;
    Type type = Type::kFloat;
    std::int64_t shape[4] = {};
};

// One of the kernels: V channels per thread, interpolation in FP32 or in FP16 pairs. The number is what TensorRT stores.
struct Tactic {
    std::int32_t width = 1;
    bool paired = false;

    std::int32_t id() const { return width + (paired ? 32 : 0); }

    static Tactic of(std::int32_t id) { return {id % 32, id >= 32}; }

    bool fits(Type x, std::int64_t channels_per_group) const {
        const bool known = width == 1 || width == 2 || width == 4 || width == 8 || width == 16;
        return known && channels_per_group % width == 0 && (!paired || (width > 1 && (x == Type::kHalf || x == Type::kInt8)));
    }
};

constexpr Tactic kTactics[] = {{1, false}, {2, false}, {4, false}, {8, false}, {16, false}, {2, true}, {4, true}, {8, true}, {16, true}};

// Return whether a combination of types has a kernel. Offsets are never BF16 and never INT8.
inline bool is_supported(Type x, Type offset, Type mask, Type y, bool record) {
    if ((offset != Type::kFloat && offset != Type::kHalf) || (record && mask != offset)) {
        return false;
    }
    switch (x) {
        case Type::kFloat: return offset == Type::kFloat && mask == x && y == x;
        case Type::kHalf: return (mask == x || record) && y == x;
        case Type::kBfloat16: return (mask == x || record) && y == x;
        case Type::kInt8: return offset == Type::kHalf && mask == Type::kHalf && (y == Type::kHalf || y == Type::kInt8);
    }
    return false;
}

// Fill `problem`; return what is wrong, or nothing. `center` has no data when there is none.
inline std::string make_problem(const Attributes& a, const Operand& x, const Operand& offset, const Operand& mask, const Operand& center,
                                const Operand& y, Tactic tactic, Problem& problem) {
    if (auto error = a.error(); !error.empty()) {
        return error;
    }
    const std::int64_t batch = x.shape[0], height = x.shape[1], width = x.shape[2], channels = x.shape[3];
    const std::int64_t rows = (height + 2 * a.pad_h - a.dilation_h * (a.kernel_h - 1) - 1) / a.stride_h + 1;
    const std::int64_t columns = (width + 2 * a.pad_w - a.dilation_w * (a.kernel_w - 1) - 1) / a.stride_w + 1;
    const std::int64_t points = a.points(), pixels = batch * rows * columns;
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max(), longest = 1 << 20;
    if (height < 1 || width < 1 || rows < 1 || columns < 1 || height > longest || width > longest || height * width * channels > most) {
        return "an image of " + std::to_string(height) + "x" + std::to_string(width) + "x" + std::to_string(channels) + " is too small or too large";
    }
    if (channels < 1 || channels % a.group || rows * columns * channels > most) {
        return std::to_string(channels) + " channels do not make " + std::to_string(a.group) + " groups, or are too many";
    }
    const auto fits = [&](const Operand& operand, std::int64_t least, bool exactly) {
        const auto last = operand.shape[3];
        return operand.shape[0] == batch && operand.shape[1] == rows && operand.shape[2] == columns && last % a.group == 0 &&
               (exactly ? last == least : last >= least) && last <= most;
    };
    if (!fits(offset, a.group * (a.record ? 3 : 2) * points, !a.record) || !fits(mask, a.group * (a.record ? 3 : 1) * points, !a.record)) {
        return "offset and mask must have " + std::to_string(rows) + "x" + std::to_string(columns) + " pixels of " + std::to_string(points) +
               " points in " + std::to_string(a.group) + " groups";
    }
    if (center.data && (!fits(center, a.group, true) || rows != height || columns != width || center.type != x.type || x.type == Type::kInt8)) {
        return "center must be of the type of x, [N, H, W, G], at stride 1";
    }
    if (!fits(y, channels, true) || !is_supported(x.type, offset.type, mask.type, y.type, a.record)) {
        return "there is no kernel for these types, or the output has another shape";
    }
    const std::int64_t per_group = channels / a.group;
    if (!tactic.fits(x.type, per_group)) {
        return "tactic " + std::to_string(tactic.id()) + " does not fit " + std::to_string(per_group) + " channels per group";
    }
    const std::int64_t blocks = per_group / tactic.width, per_image = rows * columns * a.group * blocks;
    problem = {};
    problem.x = x.data, problem.offset = offset.data, problem.mask = mask.data, problem.center = center.data, problem.y = y.data;
    problem.items = batch * per_image, problem.items_per_image = per_image, problem.image_elements = height * width * channels;
    problem.blocks = Divisor::of(blocks), problem.groups = Divisor::of(a.group);
    problem.columns = Divisor::of(columns), problem.rows = Divisor::of(rows);
    const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    problem.height = narrow(height), problem.width = narrow(width);
    problem.channels = narrow(channels), problem.channels_per_group = narrow(per_group);
    problem.offset_row = narrow(offset.shape[3] / a.group), problem.mask_row = narrow(mask.shape[3] / a.group);
    problem.mask_start = a.record ? narrow(2 * points) : 0;
    problem.kernel_h = a.kernel_h, problem.kernel_w = a.kernel_w, problem.points = narrow(points);
    problem.skipped = a.remove_center ? narrow(points / 2) : narrow(points);
    problem.stride_h = a.stride_h, problem.stride_w = a.stride_w, problem.dilation_h = a.dilation_h, problem.dilation_w = a.dilation_w;
    problem.reach_h = a.dilation_h * (a.kernel_h - 1) / 2, problem.reach_w = a.dilation_w * (a.kernel_w - 1) / 2;
    problem.first_h = problem.reach_h - a.pad_h, problem.first_w = problem.reach_w - a.pad_w;
    problem.softmax = a.softmax, problem.y_is_int8 = y.type == Type::kInt8;
    problem.offset_scale = a.offset_scale, problem.x_scale = a.x_scale, problem.y_factor = 1.0f / a.y_scale;
    (void)pixels;
    return {};
}

// One compiled kernel.
template <class X, class Source, class Math, int V, int Kernel>
struct Instance {
    static constexpr int kKernel = Kernel;
    DC_INLINE static void run(const Problem& p, std::int64_t item) { compute<X, Source, Math, V, Kernel>(p, item); }
};

template <class X, class Source, class Math, int Kernel, class Call>
bool with_width(int width, Call call) {
    switch (width) {
        case 1:
            if constexpr (std::is_same_v<Math, Exact>) {
                return call(Instance<X, Source, Math, 1, Kernel>{}), true;
            }
            return false;
        case 2: return call(Instance<X, Source, Math, 2, Kernel>{}), true;
        case 4: return call(Instance<X, Source, Math, 4, Kernel>{}), true;
        case 8: return call(Instance<X, Source, Math, 8, Kernel>{}), true;
        case 16: return call(Instance<X, Source, Math, 16, Kernel>{}), true;
        default: return false;
    }
}

template <class X, class Source, int Kernel, class Call>
bool with_math(Tactic tactic, Call call) {
    if constexpr (std::is_same_v<X, Half> || std::is_same_v<X, std::int8_t>) {
        if (tactic.paired) {
            return with_width<X, Source, Paired, Kernel>(tactic.width, call);
        }
    }
    return with_width<X, Source, Exact, Kernel>(tactic.width, call);
}

template <class X, class O, class M, class Call>
bool with_kernel(const Problem& p, Tactic tactic, Call call) {
    if (p.kernel_h == 3 && p.kernel_w == 3 && p.points == 9) {
        if constexpr (std::is_same_v<O, Half> && std::is_same_v<M, Half>) {
            if (p.mask_start == 18 && p.offset_row == 32 && p.mask == p.offset) {
                return with_math<X, Record, 3>(tactic, call);
            }
        }
        return with_math<X, Operands<O, M>, 3>(tactic, call);
    }
    return with_math<X, Operands<O, M>, 0>(tactic, call);
}

// Call `call(Instance)` with the kernel for these types; return whether there is one.
template <class Call>
bool dispatch(const Problem& p, Type x, Type offset, Type mask, Tactic tactic, Call call) {
    const bool wide = offset == Type::kFloat;
    switch (x) {
        case Type::kFloat: return with_kernel<float, float, float>(p, tactic, call);
        case Type::kHalf:
            if (mask == Type::kFloat) {
                return with_kernel<Half, float, float>(p, tactic, call);
            }
            return wide ? with_kernel<Half, float, Half>(p, tactic, call) : with_kernel<Half, Half, Half>(p, tactic, call);
        case Type::kBfloat16:
            if (mask == Type::kBfloat16) {
                return wide ? with_kernel<Bfloat16, float, Bfloat16>(p, tactic, call) : with_kernel<Bfloat16, Half, Bfloat16>(p, tactic, call);
            }
            return wide ? with_kernel<Bfloat16, float, float>(p, tactic, call) : with_kernel<Bfloat16, Half, Half>(p, tactic, call);
        case Type::kInt8: return with_kernel<std::int8_t, Half, Half>(p, tactic, call);
    }
    return false;
}

}  // namespace deploycc
