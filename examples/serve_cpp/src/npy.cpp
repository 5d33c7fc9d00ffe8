#include "deploycc/npy.hpp"

#include <array>
#include <cctype>
#include <cstring>
#include <string>

#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

struct Code {
    std::string_view text;
    DataType type;
};

constexpr std::array<Code, 13> CODES{{{"<f2", DataType::FP16},
                                      {"<f4", DataType::FP32},
                                      {"<f8", DataType::FP64},
                                      {"|i1", DataType::INT8},
                                      {"<i2", DataType::INT16},
                                      {"<i4", DataType::INT32},
                                      {"<i8", DataType::INT64},
                                      {"|u1", DataType::UINT8},
                                      {"<u2", DataType::UINT16},
                                      {"<u4", DataType::UINT32},
                                      {"<u8", DataType::UINT64},
                                      {"|b1", DataType::BOOL},
                                      {"<V2", DataType::BF16}}};
constexpr std::string_view MAGIC = "\x93NUMPY";
constexpr std::size_t LONGEST_HEADER = 65536;

[[noreturn]] void refuse(const std::string& what, const std::string& name) {
    throw Refusal(Kind::contract, what, "the array '" + name + "'", "write it with numpy.save(path, array, allow_pickle=False)");
}

// The text after `'key':` in the header, which is a Python dictionary.
std::string_view value_of(std::string_view header, std::string_view key, const std::string& name) {
    const std::string quoted = "'" + std::string(key) + "':";
    const std::size_t found = header.find(quoted);
    if (found == std::string_view::npos) refuse("the header lacks '" + std::string(key) + "'", name);
    header.remove_prefix(found + quoted.size());
    while (!header.empty() && header.front() == ' ') header.remove_prefix(1);
    return header;
}

DataType read_type(std::string_view text, const std::string& name) {
    if (text.empty() || text.front() != '\'') refuse("the type is not plain", name);
    const std::string_view code = text.substr(1, text.find('\'', 1) - 1);
    for (const Code& each : CODES) {
        if (each.text == code) return each.type;
    }
    refuse("elements of type '" + std::string(code.substr(0, 32)) + "' are not read", name);
}

Shape read_shape(std::string_view text, const std::string& name) {
    if (text.empty() || text.front() != '(') refuse("the shape cannot be read", name);
    Shape shape;
    std::int64_t number = -1;
    for (const char c : text.substr(1)) {
        if (std::isdigit(static_cast<unsigned char>(c))) {
            number = (number < 0 ? 0 : number) * 10 + (c - '0');
            if (number > (std::int64_t{1} << 40)) refuse("a dimension is too large", name);
        } else if (c == ',' || c == ')') {
            if (number >= 0) shape.push_back(number);
            number = -1;
            if (c == ')') return shape;
        } else if (c != ' ') {
            break;
        }
    }
    refuse("the shape cannot be read", name);
}

}  // namespace

Tensor parse_npy(const Bytes& file, const std::string& name) {
    if (file.size() < 10 || std::memcmp(file.data(), MAGIC.data(), MAGIC.size()) != 0) refuse("this is no .npy file", name);
    const int version = file[6];
    const std::size_t prefix = version == 1 ? 10 : 12;
    if (version < 1 || version > 3 || file.size() < prefix) refuse("the version of the .npy file is not known", name);
    std::size_t length = file[8] | (file[9] << 8);
    if (version > 1) length |= (static_cast<std::size_t>(file[10]) << 16) | (static_cast<std::size_t>(file[11]) << 24);
    if (length > LONGEST_HEADER || file.size() - prefix < length) refuse("the header is longer than the file", name);
    const std::string_view header(reinterpret_cast<const char*>(file.data()) + prefix, length);
    if (value_of(header, "fortran_order", name).substr(0, 5) != "False") refuse("the array is not in C order", name);
    Tensor tensor{name, read_type(value_of(header, "descr", name), name), read_shape(value_of(header, "shape", name), name), {}};
    const std::size_t begin = prefix + length, bytes = count(tensor.shape) * size_of(tensor.type);
    if (file.size() - begin != bytes) {
        refuse("the array holds " + std::to_string(file.size() - begin) + " bytes, its shape needs " + std::to_string(bytes), name);
    }
    tensor.data.assign(file.begin() + static_cast<std::ptrdiff_t>(begin), file.end());
    return tensor;
}

Bytes write_npy(const Tensor& tensor) {
    std::string code;
    for (const Code& each : CODES) {
        if (each.type == tensor.type) code = each.text;
    }
    std::string header = "{'descr': '" + code + "', 'fortran_order': False, 'shape': (";
    for (std::int64_t dimension : tensor.shape) header += std::to_string(dimension) + ",";
    header += "), }";
    header.append(63 - (10 + header.size()) % 64, ' ');
    header += '\n';
    const std::string length{static_cast<char>(header.size() & 255), static_cast<char>(header.size() >> 8)};
    const std::string head = std::string(MAGIC) + '\x01' + '\0' + length + header;
    Bytes file(head.size());
    std::memcpy(file.data(), head.data(), head.size());
    file.insert(file.end(), tensor.data.begin(), tensor.data.end());
    return file;
}

}  // namespace deploycc
