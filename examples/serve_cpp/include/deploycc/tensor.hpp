// A tensor in host memory: name, type, shape, and its bytes in row-major order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace deploycc {

using Bytes = std::vector<std::uint8_t>;
using Shape = std::vector<std::int64_t>;

// The types of the KServe v2 inference protocol that have a fixed size.
enum class DataType { FP16, BF16, FP32, FP64, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64, BOOL };

std::string_view name_of(DataType type);
std::size_t size_of(DataType type);
// Throws Refusal for a name that is none of the above.
DataType parse_datatype(std::string_view name);

std::string to_string(const Shape& shape);
// The number of elements. Throws Refusal for a negative dimension or more than 2^31 - 1 elements, TensorRT's limit.
std::size_t count(const Shape& shape);

struct Tensor {
    std::string name;
    DataType type = DataType::FP32;
    Shape shape;
    Bytes data;

    template <class T>
    const T* as() const { return reinterpret_cast<const T*>(data.data()); }
    template <class T>
    T* as() { return reinterpret_cast<T*>(data.data()); }
};

using Tensors = std::vector<Tensor>;

// An uninitialized tensor of the right number of bytes.
Tensor make_tensor(std::string name, DataType type, Shape shape);

// The elements as numbers of double precision, whatever the type.
std::vector<double> to_doubles(const Tensor& tensor);

// Signal over noise, 10 log10(|y|^2 / |y' - y|^2), at most 200; -200 when shapes differ or a number is not finite.
double sqnr_db(const Tensor& expected, const Tensor& found);

// Rows [begin, end) of the first dimension.
Tensor rows(const Tensor& tensor, std::int64_t begin, std::int64_t end);
// All rows of all tensors in order; names, types and the other dimensions must agree.
Tensor stack(const std::vector<const Tensor*>& parts);

}  // namespace deploycc
