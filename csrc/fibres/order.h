// Who gets the next turn: MPKERNELS_FIBRES_ORDER.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  struct Order {
    enum class Kind { forward, reverse, random } kind = Kind::forward;
    std::uint64_t seed = 0;

    // "forward", "reverse" or "random:SEED".
    static Order parse(const std::string& text) {
      if (text.empty() || text == "forward") return {Kind::forward, 0};
      if (text == "reverse") return {Kind::reverse, 0};
      const std::string prefix = "random:";
      if (text.rfind(prefix, 0) == 0 && text.size() > prefix.size() && text.size() < prefix.size() + 19 &&
          text.find_first_not_of("0123456789", prefix.size()) == std::string::npos) {
        return {Kind::random, std::stoull(text.substr(prefix.size()))};
      }
      throw std::invalid_argument("MPKERNELS_FIBRES_ORDER is '" + text + "', expected forward, reverse or random:SEED");
    }

    // Which block runs as number `turn` of `count`.
    std::uint64_t block_at(std::uint64_t turn, std::uint64_t count) const {
      if (kind == Kind::forward || count < 2) return turn;
      if (kind == Kind::reverse) return count - 1 - turn;
      // turn * stride + seed, with a stride that has no common divisor with count, visits every block once.
      std::uint64_t stride = (seed * 0x9E3779B97F4A7C15u) % count | 1;
      while (std::gcd(stride, count) != 1) ++stride;
      return static_cast<std::uint64_t>((static_cast<unsigned __int128>(turn) * stride + seed) % count);
    }
  };

  // The turns of the threads of a block.
  class Turns {
   public:
    explicit Turns(const Order& order) : kind_(order.kind), state_(order.seed * 2 + 1) {}

    // Before the first block: `threads` comes in ascending order.
    void arrange_once(std::vector<unsigned>& threads) const {
      if (kind_ == Order::Kind::reverse) std::reverse(threads.begin(), threads.end());
    }

    // Before each pass over the threads.
    void arrange_pass(std::vector<unsigned>& threads) {
      if (kind_ != Order::Kind::random) return;
      for (std::size_t i = threads.size(); i > 1; --i) std::swap(threads[i - 1], threads[next() % i]);
    }

    bool misses_turn() { return kind_ == Order::Kind::random && next() % 2 == 0; }
    bool gives_turn_away() { return kind_ == Order::Kind::random && next() % 4 == 0; }

   private:
    // splitmix64
    std::uint64_t next() {
      std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      return z ^ (z >> 31);
    }

    Order::Kind kind_;
    std::uint64_t state_;
  };

}  // namespace fibres
}  // namespace mpkernels
