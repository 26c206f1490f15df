// Work shared by torch's own threads, a little at a time, so that a core that others disturb is not waited for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace latent {

// body(begin, end) for ranges of at most `at_once` units, until all are done; small ones at the end, where threads wait
// for each other
template <class Body>
void share(int64_t units, int64_t at_once, Body body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (units + at_once - 1) / at_once);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // where torch gives one thread all of it, the first turn leaves nothing to the others
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t first = next.load(); first < units;) {
        const int64_t last = first + std::clamp<int64_t>((units - first) / (2 * threads), 1, at_once);
        if (!next.compare_exchange_weak(first, last)) continue;
        body(first, last);
        first = next.load();
      }
  });
}

}  // namespace latent
