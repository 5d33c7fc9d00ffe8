// Reading JSON with errors that say where: `reader["inputs"][0]["shape"]` knows that it is "inputs[0].shape".
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "deploycc/refusal.hpp"
#include "deploycc/tensor.hpp"

namespace deploycc {

class JsonReader {
public:
    using Json = nlohmann::json;

    JsonReader(const Json& value, std::string place, Kind kind) : value_(value), place_(std::move(place)), kind_(kind) {}

    bool has(const char* key) const { return value_.is_object() && value_.contains(key) && !value_[key].is_null(); }
    bool is_string() const { return value_.is_string(); }
    const Json& raw() const { return value_; }

    JsonReader operator[](const char* key) const {
        if (!value_.is_object()) fail("an object");
        const auto found = value_.find(key);
        if (found == value_.end()) throw Refusal(kind_, std::string("'") + key + "' is missing", place_, "");
        return JsonReader(*found, place_.empty() ? key : place_ + "." + key, kind_);
    }

    std::vector<JsonReader> items() const {
        if (!value_.is_array()) fail("a list");
        std::vector<JsonReader> found;
        for (std::size_t i = 0; i < value_.size(); ++i) found.emplace_back(value_[i], place_ + "[" + std::to_string(i) + "]", kind_);
        return found;
    }

    std::vector<std::pair<std::string, JsonReader>> entries() const {
        if (!value_.is_object()) fail("an object");
        std::vector<std::pair<std::string, JsonReader>> found;
        for (const auto& [key, value] : value_.items()) found.emplace_back(key, JsonReader(value, place_ + "." + key, kind_));
        return found;
    }

    std::string text(std::size_t longest = 4096) const {
        if (!value_.is_string() || value_.get_ref<const std::string&>().size() > longest) fail("a short text");
        return value_.get<std::string>();
    }

    double number() const {
        if (!value_.is_number()) fail("a number");
        return value_.get<double>();
    }

    bool boolean() const {
        if (!value_.is_boolean()) fail("true or false");
        return value_.get<bool>();
    }

    std::int64_t integer(std::int64_t least, std::int64_t most = std::numeric_limits<std::int64_t>::max()) const {
        const bool fits = value_.is_number_integer() && !(value_.is_number_unsigned() && value_.get<std::uint64_t>() > static_cast<std::uint64_t>(most));
        if (!fits || value_.get<std::int64_t>() < least || value_.get<std::int64_t>() > most) {
            fail(("an integer from " + std::to_string(least) + " to " + std::to_string(most)).c_str());
        }
        return value_.get<std::int64_t>();
    }

    Shape shape(std::int64_t least) const {
        Shape found;
        for (const JsonReader& each : items()) found.push_back(each.integer(least, std::numeric_limits<std::int32_t>::max()));
        if (found.size() > 16) fail("a list of at most 16 dimensions");
        return found;
    }

    [[noreturn]] void fail(const char* expected) const {
        throw Refusal(kind_, std::string("this is not ") + expected, place_.empty() ? "the JSON document" : place_, "");
    }

private:
    const Json& value_;
    std::string place_;
    Kind kind_;
};

}  // namespace deploycc
