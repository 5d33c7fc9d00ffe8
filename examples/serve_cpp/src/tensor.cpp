#include "deploycc/tensor.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

struct TypeRow {
    DataType type;
    std::string_view name;
    std::size_t size;
};

constexpr std::array<TypeRow, 13> TYPES{{{DataType::FP16, "FP16", 2},
                                         {DataType::BF16, "BF16", 2},
                                         {DataType::FP32, "FP32", 4},
                                         {DataType::FP64, "FP64", 8},
                                         {DataType::INT8, "INT8", 1},
                                         {DataType::INT16, "INT16", 2},
                                         {DataType::INT32, "INT32", 4},
                                         {DataType::INT64, "INT64", 8},
                                         {DataType::UINT8, "UINT8", 1},
                                         {DataType::UINT16, "UINT16", 2},
                                         {DataType::UINT32, "UINT32", 4},
                                         {DataType::UINT64, "UINT64", 8},
                                         {DataType::BOOL, "BOOL", 1}}};
constexpr double PERFECT_DB = 200.0;

const TypeRow& row_of(DataType type) { return TYPES[static_cast<std::size_t>(type)]; }

double from_half(std::uint16_t bits) {
    const int exponent = (bits >> 10) & 31;
    const double fraction = bits & 1023;
    const double sign = (bits & 0x8000) ? -1.0 : 1.0;
    if (exponent == 31) return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    return exponent == 0 ? sign * std::ldexp(fraction, -24) : sign * std::ldexp(fraction + 1024, exponent - 25);
}

double from_bfloat(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

template <class T>
std::vector<double> widened(const Tensor& tensor) {
    const T* data = tensor.as<T>();
    return std::vector<double>(data, data + tensor.data.size() / sizeof(T));
}

template <class Decode>
std::vector<double> decoded(const Tensor& tensor, Decode decode) {
    std::vector<double> result(tensor.data.size() / 2);
    std::transform(tensor.as<std::uint16_t>(), tensor.as<std::uint16_t>() + result.size(), result.begin(), decode);
    return result;
}

std::size_t row_bytes(const Tensor& tensor) { return tensor.shape.at(0) == 0 ? 0 : tensor.data.size() / tensor.shape[0]; }

}  // namespace

std::string_view name_of(DataType type) { return row_of(type).name; }
std::size_t size_of(DataType type) { return row_of(type).size; }

DataType parse_datatype(std::string_view name) {
    for (const TypeRow& row : TYPES) {
        if (row.name == name) return row.type;
    }
    throw Refusal(Kind::usage, "the datatype '" + std::string(name.substr(0, 32)) + "' is not known", "", "use one such as FP32, INT64 or UINT8");
}

std::string to_string(const Shape& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

std::size_t count(const Shape& shape) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    std::int64_t total = 1;
    for (std::int64_t dimension : shape) {
        if (dimension < 0 || (dimension > 0 && total > most / dimension)) {
            throw Refusal(Kind::usage, "the shape " + to_string(shape) + " is negative or has more than 2^31 - 1 elements", "", "give a smaller one");
        }
        total *= dimension;
    }
    return static_cast<std::size_t>(total);
}

Tensor make_tensor(std::string name, DataType type, Shape shape) {
    const std::size_t bytes = count(shape) * size_of(type);
    return Tensor{std::move(name), type, std::move(shape), Bytes(bytes)};
}

std::vector<double> to_doubles(const Tensor& tensor) {
    switch (tensor.type) {
        case DataType::FP16: return decoded(tensor, from_half);
        case DataType::BF16: return decoded(tensor, from_bfloat);
        case DataType::FP32: return widened<float>(tensor);
        case DataType::FP64: return widened<double>(tensor);
        case DataType::INT8: return widened<std::int8_t>(tensor);
        case DataType::INT16: return widened<std::int16_t>(tensor);
        case DataType::INT32: return widened<std::int32_t>(tensor);
        case DataType::INT64: return widened<std::int64_t>(tensor);
        case DataType::UINT16: return widened<std::uint16_t>(tensor);
        case DataType::UINT32: return widened<std::uint32_t>(tensor);
        case DataType::UINT64: return widened<std::uint64_t>(tensor);
        case DataType::UINT8:
        case DataType::BOOL: return widened<std::uint8_t>(tensor);
    }
    return {};
}

double sqnr_db(const Tensor& expected, const Tensor& found) {
    if (expected.shape != found.shape) return -PERFECT_DB;
    const std::vector<double> wanted = to_doubles(expected), got = to_doubles(found);
    double signal = 0.0, noise = 0.0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        signal += wanted[i] * wanted[i];
        noise += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    }
    if (noise == 0.0) return PERFECT_DB;
    if (signal == 0.0 || !std::isfinite(noise)) return -PERFECT_DB;
    return std::min(10.0 * std::log10(signal / noise), PERFECT_DB);
}

Tensor rows(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
    Shape shape = tensor.shape;
    const std::size_t step = row_bytes(tensor);
    shape.at(0) = end - begin;
    return Tensor{tensor.name, tensor.type, shape, Bytes(tensor.data.begin() + begin * step, tensor.data.begin() + end * step)};
}

Tensor stack(const std::vector<const Tensor*>& parts) {
    Tensor result = *parts.at(0);
    for (std::size_t i = 1; i < parts.size(); ++i) {
        result.shape.at(0) += parts[i]->shape.at(0);
        result.data.insert(result.data.end(), parts[i]->data.begin(), parts[i]->data.end());
    }
    return result;
}

}  // namespace deploycc
