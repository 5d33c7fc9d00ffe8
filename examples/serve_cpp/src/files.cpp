#include "deploycc/files.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

namespace fs = std::filesystem;

class Descriptor {
public:
    explicit Descriptor(int number) : number_(number) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (number_ >= 0) close(number_);
    }
    int number() const { return number_; }

private:
    int number_;
};

Bytes read_exactly(const Descriptor& file, std::uint64_t bytes, const std::string& at) {
    Bytes data(bytes);
    std::uint64_t done = 0;
    while (done < bytes) {
        const ssize_t got = read(file.number(), data.data() + done, bytes - done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) throw Refusal(Kind::contract, "the file ends early or cannot be read", at, "copy the bundle again");
        done += static_cast<std::uint64_t>(got);
    }
    return data;
}

std::uint64_t regular_size(const Descriptor& file, const std::string& at) {
    struct stat info {};
    if (file.number() < 0 || fstat(file.number(), &info) != 0 || !S_ISREG(info.st_mode)) {
        throw Refusal(Kind::contract, "the file is missing, a link, or no regular file", at, "copy the bundle again");
    }
    return static_cast<std::uint64_t>(info.st_size);
}

}  // namespace

std::string sha256(const Bytes& data) {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int length = 0;
    if (EVP_Digest(data.data(), data.size(), digest.data(), &length, EVP_sha256(), nullptr) != 1) {
        throw Refusal(Kind::backend, "OpenSSL does not compute SHA-256", "", "check the installation of libcrypto");
    }
    static constexpr char hex[] = "0123456789abcdef";
    std::string text;
    for (unsigned int i = 0; i < length; ++i) {
        text += hex[digest[i] >> 4];
        text += hex[digest[i] & 15];
    }
    return text;
}

bool is_inside(const std::string& path) {
    if (path.empty() || path.size() > 1024 || path.find('\\') != std::string::npos || path.find('\0') != std::string::npos) return false;
    const fs::path parsed(path);
    if (parsed.is_absolute() || parsed.lexically_normal().string() != path) return false;
    for (const fs::path& part : parsed) {
        if (part.empty() || part == "." || part == "..") return false;
    }
    return true;
}

Bytes read_inside(const fs::path& root, const std::string& path, std::uint64_t bytes) {
    const std::string at = "'" + path.substr(0, 200) + "' in " + root.string();
    if (!is_inside(path)) throw Refusal(Kind::contract, "the path leaves the bundle", at, "do not use this bundle");
    // Each step refuses links, so that nothing below the root can point outside it.
    auto folder = std::make_unique<Descriptor>(open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    const fs::path parsed(path);
    for (const fs::path& part : parsed.parent_path()) {
        folder = std::make_unique<Descriptor>(openat(folder->number(), part.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    }
    const Descriptor file(openat(folder->number(), parsed.filename().c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    const std::uint64_t size = regular_size(file, at);
    if (size != bytes) {
        const std::string what = "the file has " + std::to_string(size) + " bytes, the bundle records " + std::to_string(bytes);
        throw Refusal(Kind::contract, what, at, "copy the bundle again");
    }
    return read_exactly(file, bytes, at);
}

Bytes read_file(const fs::path& path, std::uint64_t limit) {
    const std::string at = "'" + path.string() + "'";
    const Descriptor file(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    if (file.number() < 0) throw Refusal(Kind::usage, std::string("the file cannot be opened (") + std::strerror(errno) + ")", at, "check the path");
    const std::uint64_t size = regular_size(file, at);
    if (size > limit) {
        throw Refusal(Kind::usage, "the file has " + std::to_string(size) + " bytes, at most " + std::to_string(limit) + " are read", at, "check the path");
    }
    return read_exactly(file, size, at);
}

}  // namespace deploycc
