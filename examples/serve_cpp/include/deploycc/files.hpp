// Files of a bundle: found without leaving its directory, read as a whole, and compared with their recorded hash.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "deploycc/tensor.hpp"

namespace deploycc {

// Lower-case hexadecimal SHA-256.
std::string sha256(const Bytes& data);

// Whether `path` is relative, in normal form, and names nothing outside its root by itself.
bool is_inside(const std::string& path);

// The bytes of a regular file below `root` that is exactly `bytes` long.
// Throws Refusal when the path leaves the root (by name or through a symbolic link), or the file is missing or of another size.
Bytes read_inside(const std::filesystem::path& root, const std::string& path, std::uint64_t bytes);

// The bytes of any regular file of at most `limit` bytes.
Bytes read_file(const std::filesystem::path& path, std::uint64_t limit);

}  // namespace deploycc
