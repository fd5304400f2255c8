// Files of kernels and what names them: SHA-256, entries under every truncation and bit flip, cubins under damage, the
// embedded sources, content ids. Needs no compiler.
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <set>
#include <sstream>

#include "cuda/ahead_of_time.h"
#include "cuda/jit/cubin.h"
#include "cuda/jit/entry.h"
#include "cuda/jit/sha256.h"
#include "cuda/jit/sources.h"
#include "heed/heed.h"

namespace heed::cuda {
namespace {

// The examples of FIPS 180-4 and one that crosses blocks.
TEST(Sha256, KnownDigests) {
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256_hex(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, DoesNotDependOnHowTheBytesArrive) {
  const std::string text(317, 'x');
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Sha256 hash;
    hash.update(std::string_view(text).substr(0, cut));
    hash.update(std::string_view(text).substr(cut));
    ASSERT_EQ(hash.hex_digest(), sha256_hex(text)) << cut;
  }
}

// ---------------------------------------------------------------------------------------------------------------------

Entry example_entry() {
  return {"0123456789abcdef0123456789abcdef",   "probe Probe<64>", "sm_90a", "nvrtc 13.0", "a log\nof two lines",
          std::string("\0\n\x7f\xff cubin", 10)};
}

TEST(Entry, ComesBackAsItWas) {
  for (const std::string& log : {std::string(), std::string("\n\n"), std::string(5000, 'l')}) {
    Entry entry = example_entry();
    entry.log = log;
    std::string reason;
    const std::optional<Entry> read = parse_entry(to_bytes(entry), reason);
    ASSERT_TRUE(read) << reason;
    EXPECT_EQ(read->id, entry.id);
    EXPECT_EQ(read->spec, entry.spec);
    EXPECT_EQ(read->arch, entry.arch);
    EXPECT_EQ(read->compiler, entry.compiler);
    EXPECT_EQ(read->log, entry.log);
    EXPECT_EQ(read->cubin, entry.cubin);
  }
}

TEST(Entry, EveryTruncationIsRefused) {
  const std::string bytes = to_bytes(example_entry());
  for (size_t size = 0; size < bytes.size(); ++size) {
    std::string reason;
    ASSERT_FALSE(parse_entry(std::string_view(bytes).substr(0, size), reason)) << size;
    ASSERT_NE(reason, "") << size;
  }
}

TEST(Entry, EveryFlippedBitIsRefused) {
  const std::string bytes = to_bytes(example_entry());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    std::string reason;
    ASSERT_FALSE(parse_entry(damaged, reason)) << bit;
  }
}

TEST(Entry, MoreBytesThanItSaysAreRefused) {
  std::string reason;
  EXPECT_FALSE(parse_entry(to_bytes(example_entry()) + "x", reason));
}

// A header that lies under a right checksum: sizes are checked, not believed.
TEST(Entry, LyingHeadersAreRefused) {
  for (const char* header : {"log 5\ncubin 18446744073709551615\n\n", "log 18446744073709551615\ncubin 2\n\n",
                             "log -1\ncubin 1\n\n", "log 1x\ncubin 1\n\n", "log 1\n\n", "log 9\ncubin 9\n\n", ""}) {
    const std::string body = std::string("\nid i\nspec s\narch a\ncompiler c\n") + header + "logcubin";
    std::string reason;
    EXPECT_FALSE(parse_entry("heed-kernel 1\nsha256 " + sha256_hex(body) + body, reason)) << header;
    EXPECT_EQ(reason, "its header is wrong");
  }
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(Cubin, WhatIsNoCubinHasNoConstants) {
  EXPECT_FALSE(cubin_constant("", "heed_num_threads"));
  EXPECT_FALSE(
      cubin_constant("\x7f"
                     "ELF",
                     "heed_num_threads"));
  EXPECT_FALSE(cubin_constant(std::string(4096, '\xff'), "heed_num_threads"));
  std::ifstream self("/proc/self/exe", std::ios::binary);  // an ELF file of another machine
  std::stringstream bytes;
  bytes << self.rdbuf();
  EXPECT_FALSE(cubin_constant(bytes.str(), "heed_num_threads"));
}

// Random bytes behind a right beginning: no offset may be believed (the sanitizer build would see it).
TEST(Cubin, RandomOffsetsAreHarmless) {
  std::mt19937 random(0);
  for (int repeat = 0; repeat < 4000; ++repeat) {
    std::string bytes(64 + random() % 512, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random() % 3 == 0 ? random() : random() % 65);
    const char start[] =
        "\x7f"
        "ELF\x02\x01\x01";
    std::copy(start, start + 7, bytes.begin());
    bytes[18] = static_cast<char>(190);
    bytes[19] = 0;
    bytes[58] = 64;  // the size of a section header
    bytes[59] = 0;
    cubin_constant(bytes, "heed_num_threads");
    cubin_constant(bytes, "");
  }
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(Sources, AreEmbeddedAsTheyAre) {
  ASSERT_FALSE(embedded_sources().empty());
  std::string_view last;
  for (const EmbeddedSource& source : embedded_sources()) {
    EXPECT_LT(last, source.path);  // sorted, each once
    last = source.path;
    EXPECT_EQ(sha256_hex(source.text), source.sha256) << source.path;
    EXPECT_EQ(source.text.data()[source.text.size()], '\0') << source.path;
    EXPECT_EQ(find_source(source.path), &source);
  }
  EXPECT_EQ(find_source("cuda/device/nothing.cuh"), nullptr);
  EXPECT_EQ(find_source(""), nullptr);
}

TEST(Sources, HeadersOfAFamilyAreThoseItIncludes) {
  std::set<std::string_view> paths;
  for (const EmbeddedSource* header : transitive_headers("probe")) paths.insert(header->path);
  EXPECT_EQ(paths, (std::set<std::string_view>{"cuda/device/probe.cuh", "variants/band.h", "variants/host_device.h"}));
}

// What a header includes must be in the library, or it compiles on the developer's machine only.
TEST(Sources, EveryIncludeOfADeviceSourceIsEmbedded) {
  for (const EmbeddedSource& source : embedded_sources()) {
    std::istringstream lines{std::string(source.text)};
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("#include")) continue;
      const size_t open = line.find('"');
      ASSERT_NE(open, std::string::npos) << source.path << ": " << line << ": only headers of ours are there";
      const std::string path = line.substr(open + 1, line.find('"', open + 1) - open - 1);
      EXPECT_NE(find_source(path), nullptr) << source.path << ": " << line;
    }
  }
}

TEST(KernelSpec, TextComesBack) {
  const KernelSpec spec{"probe", "Probe<64, 128>"};
  EXPECT_EQ(to_text(spec), "probe Probe<64, 128>");
  EXPECT_EQ(parse_kernel_spec("probe Probe<64, 128>"), spec);
}

TEST(KernelSpec, WrongOnesAreRefused) {
  for (const char* text : {"", "probe", "probe ", "probe  ", "nothing Probe<64>", "../probe Probe<64>", " Probe<64>",
                           "probe Probe<64>\n", "probe Probe<64>;\n#include \"/etc/passwd\""}) {
    EXPECT_THROW(parse_kernel_spec(text), ValueError) << text;
  }
  EXPECT_THROW(content_id({"nothing", "Probe<64>"}, "sm_90a"), ValueError);
  for (const char* arch : {"", "sm_", "sm_9", "sm_9000", "90a", "sm_90b", "sm_90aa", "compute_90", "sm_90a --x"}) {
    EXPECT_THROW(content_id({"probe", "Probe<64>"}, arch), ValueError) << arch;
  }
}

TEST(ContentId, DependsOnAllThatMachineCodeDependsOn) {
  const std::string id = content_id({"probe", "Probe<64>"}, "sm_90a");
  EXPECT_EQ(id.size(), 32U);
  EXPECT_EQ(id, content_id({"probe", "Probe<64>"}, "sm_90a"));
  EXPECT_NE(id, content_id({"probe", "Probe<96>"}, "sm_90a"));
  EXPECT_NE(id, content_id({"probe", "Probe<64>"}, "sm_90"));
  std::set<std::string> ids;
  for (int threads = 32; threads <= 1024; threads += 32) {
    for (const char* arch : {"sm_80", "sm_89", "sm_90a", "sm_100", "sm_120a", "sm_103f"}) {
      ids.insert(content_id({"probe", "Probe<" + std::to_string(threads) + ">"}, arch));
    }
  }
  EXPECT_EQ(ids.size(), 32U * 6);
}

TEST(Arch, OfAComputeCapability) {
  EXPECT_EQ(arch_for(80), "sm_80");
  EXPECT_EQ(arch_for(89), "sm_89");
  EXPECT_EQ(arch_for(90), "sm_90a");
  EXPECT_EQ(arch_for(100), "sm_100");
  EXPECT_EQ(arch_for(120), "sm_120");
}

TEST(AheadOfTime, EveryEntryIsASpecOfThisBuildAndThereOnce) {
  for (const char* arch : {"sm_80", "sm_89", "sm_90a", "sm_100"}) {
    std::set<std::string> texts;
    for (const KernelSpec& spec : ahead_of_time_list(arch)) {
      EXPECT_EQ(parse_kernel_spec(to_text(spec)), spec);
      EXPECT_TRUE(texts.insert(to_text(spec)).second) << to_text(spec);
    }
    EXPECT_FALSE(texts.empty());
  }
  EXPECT_THROW(ahead_of_time_list("hopper"), ValueError);
}

}  // namespace
}  // namespace heed::cuda
