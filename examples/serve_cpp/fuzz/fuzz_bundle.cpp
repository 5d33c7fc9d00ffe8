// libFuzzer target: whatever the text of bundle.json, it is a bundle or a Refusal.
#include "deploycc/bundle.hpp"
#include "deploycc/refusal.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        deploycc::parse_bundle(std::string_view(reinterpret_cast<const char*>(data), size));
    } catch (const deploycc::Refusal&) {
    }
    return 0;
}
