// A table from texts to prepared values, for the hot path of compiled programs: finding is lock-free, entries are never
// removed, and their number is bounded.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

namespace heed {

template <class Value, size_t kMaxEntries = 16384>
class TextTable {
 public:
  TextTable() = default;
  TextTable(const TextTable&) = delete;
  TextTable& operator=(const TextTable&) = delete;
  ~TextTable() {
    for (std::atomic<Node*>& bucket : buckets_) {
      for (Node* node = bucket.load(); node != nullptr;) {
        Node* next = node->next;
        delete node;
        node = next;
      }
    }
  }

  // The value stored under the text, or null.
  std::shared_ptr<const Value> find(std::string_view text) const {
    const size_t hash = std::hash<std::string_view>{}(text);
    const Node* node = buckets_[hash % kNumBuckets].load(std::memory_order_acquire);
    for (; node != nullptr; node = node->next) {
      if (node->hash == hash && node->text == text) return node->value;
    }
    return nullptr;
  }

  // Stores the value unless the text is there already or the table is full. Returns what a caller is to use.
  std::shared_ptr<const Value> insert(std::string_view text, std::shared_ptr<const Value> value) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::shared_ptr<const Value> known = find(text)) return known;
    if (num_entries_ == kMaxEntries) return value;
    const size_t hash = std::hash<std::string_view>{}(text);
    std::atomic<Node*>& bucket = buckets_[hash % kNumBuckets];
    bucket.store(new Node{hash, std::string(text), value, bucket.load(std::memory_order_relaxed)},
                 std::memory_order_release);
    ++num_entries_;
    return value;
  }

 private:
  struct Node {
    size_t hash;
    std::string text;
    std::shared_ptr<const Value> value;
    Node* next;
  };
  static constexpr size_t kNumBuckets = 4096;

  std::array<std::atomic<Node*>, kNumBuckets> buckets_{};
  std::mutex mutex_;
  size_t num_entries_ = 0;
};

}  // namespace heed
