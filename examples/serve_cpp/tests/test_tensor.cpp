#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "scratch.hpp"

using namespace deploycc;

TEST_CASE("a .npy file comes back as it was written") {
    const Tensor tensor = floats("t", {2, 1, 3}, {1, -2, 3.5F, 0, 1e-30F, 6});
    const Tensor again = parse_npy(write_npy(tensor), "t");
    CHECK(again.shape == tensor.shape);
    CHECK(again.type == tensor.type);
    CHECK(again.data == tensor.data);
    CHECK(write_npy(tensor).size() % 8 == 0);
    const Tensor scalar = floats("s", {}, {7});
    CHECK(parse_npy(write_npy(scalar), "s").shape.empty());
}

TEST_CASE("a .npy file that is damaged or holds objects is refused") {
    const Bytes good = write_npy(floats("t", {2, 2}, {1, 2, 3, 4}));
    for (std::size_t length = 0; length < good.size(); ++length) {
        CHECK(!refusal_of([&] { parse_npy(Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length)), "t"); }).empty());
    }
    const auto with = [&](const std::string& from, const std::string& to) {
        std::string text(good.begin(), good.end());
        text.replace(text.find(from), from.size(), to);
        return refusal_of([&] { parse_npy(Bytes(text.begin(), text.end()), "t"); });
    };
    CHECK(contains(with("<f4", "|O8"), "of type '|O8' are not read"));
    CHECK(contains(with("False", "True,"), "not in C order"));
    CHECK(contains(with("(2,2,)", "(2,9,)"), "its shape needs 72"));
    CHECK(contains(with("(2,2,)", "(2,-2,"), "shape cannot be read"));
    CHECK(contains(with("'descr'", "'dascr'"), "lacks 'descr'"));
}

TEST_CASE("elements are counted without overflow") {
    CHECK(count({}) == 1);
    CHECK(count({3, 0, 5}) == 0);
    CHECK(count({2147483647}) == 2147483647);
    CHECK(contains(refusal_of([] { count({2147483647, 2}); }), "2^31"));
    CHECK(contains(refusal_of([] { count({1LL << 62, 1LL << 62}); }), "2^31"));
    CHECK(contains(refusal_of([] { count({-1}); }), "negative"));
}

TEST_CASE("SQNR is that of the definition") {
    const Tensor one = floats("y", {1, 2}, {3, 4});
    CHECK(sqnr_db(one, one) == 200.0);
    CHECK(sqnr_db(one, floats("y", {1, 2}, {3, 4.5F})) == doctest::Approx(10 * std::log10(25 / 0.25)));
    CHECK(sqnr_db(one, floats("y", {2, 1}, {3, 4})) == -200.0);
    CHECK(sqnr_db(one, floats("y", {1, 2}, {3, std::nanf("")})) == -200.0);
}

TEST_CASE("16-bit floats are decoded as IEEE 754 and bfloat16 say") {
    Tensor half = make_tensor("h", DataType::FP16, {6});
    const std::uint16_t bits[]{0x3C00, 0xC000, 0x0001, 0x7BFF, 0x7C00, 0x3555};
    std::memcpy(half.data.data(), bits, sizeof bits);
    const std::vector<double> values = to_doubles(half);
    CHECK(values[0] == 1.0);
    CHECK(values[1] == -2.0);
    CHECK(values[2] == std::ldexp(1.0, -24));
    CHECK(values[3] == 65504.0);
    CHECK(values[4] == std::numeric_limits<double>::infinity());
    CHECK(values[5] == doctest::Approx(1.0 / 3).epsilon(1e-3));
    half.type = DataType::BF16;
    const std::uint16_t wide[]{0x3F80, 0xC000, 0x0000, 0x4049, 0x7F80, 0xBF00};
    std::memcpy(half.data.data(), wide, sizeof wide);
    CHECK(to_doubles(half)[3] == doctest::Approx(3.140625));
    CHECK(to_doubles(half)[5] == -0.5);
}
