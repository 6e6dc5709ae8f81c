// Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): four random words from a
// counter of four and a key of two, with no state, so that every backend finds the same word by itself. The schema of
// an op says which counter belongs to which number.
#pragma once

#include "common/launch.h"

#include <cstdint>

namespace mpkernels {

// In place, for COUNT counters side by side: words[.][i] is the i-th counter, and then its four random words.
template <int COUNT>
MPKERNELS_HOST_DEVICE inline void philox(uint64_t key, uint32_t (&words)[4][COUNT]) {
  auto key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < COUNT; ++i) {
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

}  // namespace mpkernels
