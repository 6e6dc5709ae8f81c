// Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): four random words from a
// counter of four and a key of two, with no state. Dropout draws the word of a weight from its place, so that every
// backend, and the backward, drop the same ones (mpkernels/attention/attention/schema.py says which counter).
#pragma once

#include <cmath>
#include <cstdint>

namespace mpkernels {
namespace attention {

// Weights whose word is below it are dropped.
inline uint64_t dropout_threshold(double probability) {
  return static_cast<uint64_t>(std::nearbyint(probability * 4294967296.0));
}

// words[.][i] for the counters (quarter, row + i, head, 0).
template <int ROWS>
void philox_rows(uint64_t seed, uint32_t quarter, uint32_t row, uint32_t head, uint32_t (&words)[4][ROWS]) {
  for (int i = 0; i < ROWS; ++i) {
    words[0][i] = quarter;
    words[1][i] = row + static_cast<uint32_t>(i);
    words[2][i] = head;
    words[3][i] = 0;
  }
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < ROWS; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * words[0][i];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * words[2][i];
      words[0][i] = static_cast<uint32_t>(product1 >> 32) ^ words[1][i] ^ key0;
      words[1][i] = static_cast<uint32_t>(product1);
      words[2][i] = static_cast<uint32_t>(product0 >> 32) ^ words[3][i] ^ key1;
      words[3][i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace attention
}  // namespace mpkernels
