#include <algorithm>
#include <sstream>

#include "deploycc/executor.hpp"
#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

// The first `parts` numbers of a version.
std::string leading(const std::string& version, int parts) {
    std::size_t end = 0;
    for (int i = 0; i < parts && end != std::string::npos; ++i) end = version.find('.', end + (i > 0));
    return version.substr(0, end);
}

std::string joined(const std::vector<std::string>& texts) {
    std::string all;
    for (const std::string& each : texts) all += (all.empty() ? "" : ", ") + each;
    return all;
}

}  // namespace

std::string mismatch(const Requirement& needs, const std::string& library, const std::string& version, const std::string& arch) {
    const int parts = needs.compatible == "version" ? 1 : 3;
    if (!needs.version.empty() && leading(needs.version, parts) != leading(version, parts)) {
        return "built by " + library + " " + needs.version + ", this machine has " + version + (parts == 1 ? " (the major versions must agree)" : " (engines run with the version that built them)");
    }
    if (!needs.archs.empty() && std::find(needs.archs.begin(), needs.archs.end(), arch) == needs.archs.end()) {
        return "built for " + joined(needs.archs) + ", " + (arch.empty() ? "and this machine has no GPU" : "this GPU is " + arch);
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
