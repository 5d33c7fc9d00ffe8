// A shared library that is opened when it is needed, so that one runner works on machines with and without it.
#pragma once

#include <dlfcn.h>

#include <string>
#include <vector>

#include "deploycc/refusal.hpp"

namespace deploycc {

class Library {
public:
    // Open the first of `names` that exists; after that, `error()` says why there is none.
    explicit Library(const std::vector<std::string>& names) {
        for (const std::string& name : names) {
            if (name.empty()) continue;
            handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
            if (handle_) return;
            error_ += (error_.empty() ? "" : "; ") + std::string(dlerror());
        }
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;
    // Never closed: objects of the library may outlive every caller.

    bool is_open() const { return handle_ != nullptr; }
    const std::string& error() const { return error_; }

    template <class Function>
    Function* find(const char* symbol) const {
        void* address = handle_ ? dlsym(handle_, symbol) : nullptr;
        if (!address) throw Refusal(Kind::backend, std::string("the library lacks '") + symbol + "'", error_, "install the version whose headers the runner was built with");
        return reinterpret_cast<Function*>(address);
    }

private:
    void* handle_ = nullptr;
    std::string error_;
};

}  // namespace deploycc
