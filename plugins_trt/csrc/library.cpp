// The doors of the library: `getCreators` and `setLoggerFinder` for loaders that ask, registration on loading for those that only dlopen.
//
// The library does not link to TensorRT. It looks for the registry of a TensorRT that the process has loaded already.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>

#include "dcnv3_plugin.h"

namespace deploycc {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

Dcnv3Creator& creator(Form form) {
    static Dcnv3Creator creators[] = {Dcnv3Creator(Form::kPlain), Dcnv3Creator(Form::kCenter), Dcnv3Creator(Form::kDequantized),
                                      Dcnv3Creator(Form::kRequantized)};
    return creators[static_cast<int>(form)];
}

constexpr Form kForms[] = {Form::kPlain, Form::kCenter, Form::kDequantized, Form::kRequantized};
bool registered = false;

template <class Function>
Function* loaded(const char* symbol) {
    if (void* found = dlsym(RTLD_DEFAULT, symbol)) {
        return reinterpret_cast<Function*>(found);
    }
    const std::string runtimes[] = {"libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR), "libnvinfer_lean.so." + std::to_string(NV_TENSORRT_MAJOR)};
    for (const std::string& name : runtimes) {
        if (void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
            if (void* found = dlsym(library, symbol)) {
                return reinterpret_cast<Function*>(found);
            }
        }
    }
    return nullptr;
}

nvinfer1::IPluginRegistry* registry() {
    auto* get = loaded<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
    return get ? get() : nullptr;
}

// Triton opens plugin libraries and does nothing else with them.
struct Registration {
    Registration() {
        if (nvinfer1::IPluginRegistry* found = registry()) {
            for (Form form : kForms) {
                if (found->getCreator(kNames[static_cast<int>(form)], kVersion, "") == nullptr) {
                    registered = found->registerCreator(creator(form), "") || registered;
                }
            }
        }
    }
} const registration;

}  // namespace

void log_error(const std::string& text) noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder.load();
    nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
    if (logger == nullptr) {
        auto* get = loaded<nvinfer1::ILogger*()>("getLogger");
        logger = get ? get() : nullptr;
    }
    const std::string line = "deploycc DCNv3: " + text;
    if (logger) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

}  // namespace deploycc

#define DC_EXPORT extern "C" __attribute__((visibility("default")))

// Called by IPluginRegistry::loadLibrary, which registers what it gets; a creator must not be registered twice.
DC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    using namespace deploycc;
    static nvinfer1::IPluginCreatorInterface* const list[] = {&creator(Form::kPlain), &creator(Form::kCenter), &creator(Form::kDequantized),
                                                              &creator(Form::kRequantized)};
    if (registered) {
        for (Form form : kForms) {
            registry()->deregisterCreator(creator(form));
        }
        registered = false;
    }
    count = static_cast<std::int32_t>(sizeof(list) / sizeof(list[0]));
    return list;
}

DC_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { deploycc::logger_finder.store(finder); }
