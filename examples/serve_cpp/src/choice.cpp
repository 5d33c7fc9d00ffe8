#include <algorithm>
#include <array>
#include <cstdlib>
#include <sstream>

#include "deploycc/executor.hpp"
#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

// The first three numbers of a version.
std::array<int, 3> numbers(const std::string& version) {
    std::array<int, 3> found{};
    std::istringstream text(version);
    char dot = '.';
    text >> found[0] >> dot >> found[1] >> dot >> found[2];
    return found;
}

constexpr int FIRST_AMPERE = 80;

std::string joined(const std::vector<std::string>& texts) {
    std::string all;
    for (const std::string& each : texts) all += (all.empty() ? "" : ", ") + each;
    return all;
}

}  // namespace

std::string mismatch(const Requirement& needs, const std::string& library, const std::string& version, const std::string& arch) {
    const auto built = numbers(needs.version), here = numbers(version);
    const bool any_later = needs.is_compatible("version");
    if (!needs.version.empty() && (any_later ? built[0] != here[0] || here < built : here != built)) {
        const std::string rule = any_later ? "it runs under that version and later ones of the same major version" : "engines run with the version that built them";
        return "built by " + library + " " + needs.version + ", this machine has " + version + " (" + rule + ")";
    }
    const bool any_ampere = needs.is_compatible("ampere-plus") && arch.rfind("sm_", 0) == 0 && std::atoi(arch.c_str() + 3) >= FIRST_AMPERE;
    if (!needs.archs.empty() && !any_ampere && std::find(needs.archs.begin(), needs.archs.end(), arch) == needs.archs.end()) {
        const std::string all = joined(needs.archs) + (needs.is_compatible("ampere-plus") ? " and every GPU from sm_80 on" : "");
        return "built for " + all + ", " + (arch.empty() ? "and this machine has no GPU" : "this GPU is " + arch);
    }
    return "";
}

Choice choose(const Bundle& bundle, const std::vector<std::unique_ptr<Backend>>& from, const std::string& name) {
    std::ostringstream reasons;
    bool known = name == "auto";
    for (const auto& backend : from) {
        if (name != "auto" && name != backend->name()) continue;
        known = true;
        bool fits = false;
        for (const Variant& variant : bundle.variants) {
            if (variant.kind != backend->kind()) continue;
            fits = true;
            const std::string reason = backend->refusal(variant);
            if (reason.empty()) return Choice{backend.get(), &variant};
            reasons << "; " << backend->name() << " does not run " << variant.path << ": " << reason;
        }
        if (!fits) reasons << "; " << backend->name() << ": the bundle has no variant of kind " << backend->kind();
    }
    std::vector<std::string> names;
    for (const auto& backend : from) names.push_back(backend->name());
    if (!known) throw Refusal(Kind::usage, "this runner has no executor '" + name + "'", "--executor", "use auto or one of " + joined(names));
    const std::string told = reasons.str().empty() ? "this runner was built without any executor" : reasons.str().substr(2);
    throw Refusal(Kind::backend, "nothing here runs this bundle: " + told, bundle.root.string(), "build for this machine (deploycc build --target ...) and bundle again");
}

}  // namespace deploycc
