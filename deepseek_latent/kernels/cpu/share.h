// Shares work among torch's own threads, a little at a time, so that no thread waits for a core that is busy otherwise.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace latent {

// calls body(begin, end) for ranges of `least` to `most` units until all are done; ranges get short at the end, where threads
// wait for each other
template <class Body>
void share(int64_t units, int64_t least, int64_t most, Body body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (units + least - 1) / least);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // if torch gives one thread all of the loop, its first turn does all the work
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t first = next.load(); first < units;) {
        const int64_t last = std::min(first + std::clamp((units - first) / (2 * threads), least, most), units);
        if (!next.compare_exchange_weak(first, last)) continue;
        body(first, last);
        first = next.load();
      }
  });
}

}  // namespace latent
