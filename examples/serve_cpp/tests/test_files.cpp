#include <doctest/doctest.h>

#include "scratch.hpp"

using namespace deploycc;

TEST_CASE("SHA-256 is that of FIPS 180-4") {
    CHECK(sha256({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256({'a', 'b', 'c'}) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_CASE("only plain relative paths are inside") {
    for (const char* good : {"a", "a/b.npy", "engines/tensorrt-rtx-sm_80+sm_89.engine", "..a/b..", "a b"}) CHECK_MESSAGE(is_inside(good), std::string(good));
    for (const char* bad : {"", "/", "/etc/passwd", "..", "../a", "a/../b", "a/..", "./a", "a/.", "a//b", "a/", "a\\b", "~/../x"}) {
        CHECK_MESSAGE(!is_inside(bad), std::string(bad));
    }
    CHECK(!is_inside(std::string("a\0b", 3)));
    CHECK(!is_inside(std::string(2000, 'a')));
}

TEST_CASE("a file is read only below its root, with the size that was recorded") {
    const Folder folder, outside;
    folder.write("sub/a.bin", std::string("12345"));
    outside.write("secret", std::string("12345"));
    CHECK(read_inside(folder.path(), "sub/a.bin", 5).size() == 5);
    CHECK(contains(refusal_of([&] { read_inside(folder.path(), "sub/a.bin", 4); }), "has 5 bytes, the bundle records 4"));
    CHECK(contains(refusal_of([&] { read_inside(folder.path(), "sub/b.bin", 5); }), "missing"));
    CHECK(contains(refusal_of([&] { read_inside(folder.path(), "sub", 5); }), "no regular file"));
    CHECK(contains(refusal_of([&] { read_inside(folder.path(), "../secret", 5); }), "leaves the bundle"));
    SUBCASE("a link to a file outside") {
        std::filesystem::create_symlink(outside.path() / "secret", folder.path() / "link");
        CHECK(contains(refusal_of([&] { read_inside(folder.path(), "link", 5); }), "a link"));
    }
    SUBCASE("a link to a folder outside") {
        std::filesystem::create_directory_symlink(outside.path(), folder.path() / "away");
        CHECK(contains(refusal_of([&] { read_inside(folder.path(), "away/secret", 5); }), "a link"));
    }
}

TEST_CASE("a file above the limit is not read") {
    const Folder folder;
    folder.write("a", std::string(100, 'x'));
    CHECK(read_file(folder.path() / "a", 100).size() == 100);
    CHECK(contains(refusal_of([&] { read_file(folder.path() / "a", 99); }), "at most 99"));
    CHECK(contains(refusal_of([&] { read_file(folder.path() / "b", 99); }), "cannot be opened"));
    CHECK(contains(refusal_of([&] { read_file("/dev/zero", 99); }), "no regular file"));
}
