// Waking a thread that sleeps on another processor takes tens of microseconds, longer than most exits need to be
// handled. So both sides wait for each other with open eyes first, for a moment, as long as that has been worth it.
#pragma once

#include <cstdint>

#include "libuv.h"

class AdaptiveSpin {
 public:
  /** Waits until ready() is true. False when it did not happen in a moment: then sleep. */
  template <typename Ready>
  bool wait(Ready ready) {
    return ready() || attempt([&] {
             for (uint64_t end = uv_hrtime() + kNanoseconds; uv_hrtime() < end;) {
               for (int i = 0; i < 16; i++) __builtin_ia32_pause();
               if (ready()) return true;
             }
             return false;
           });
  }

  /** The same with another way to wait for a moment: `wait()` says whether it happened. */
  template <typename Wait>
  bool attempt(Wait wait) {
    if (skip_ > 0) {
      skip_--;
      return false;
    }
    if (wait()) {
      penalty_ = 1;
      return true;
    }
    // A busy machine, or a guest that computes for long: each failure doubles the number of waits without spinning.
    skip_ = penalty_;
    if (penalty_ < kMaxPenalty) penalty_ *= 2;
    return false;
  }

 private:
  static constexpr uint64_t kNanoseconds = 30000;
  static constexpr uint32_t kMaxPenalty = 256;
  uint32_t skip_ = 0;
  uint32_t penalty_ = 1;
};
