// When queued work begins: late, by draws from a seed.
#pragma once

#include <cstdint>
#include <random>

namespace simgpu {

// When queued work may begin. A piece is held until the host has made some more calls
// (drawn: `most_held_ops` at most), or `held_seconds` have passed since it was queued, or
// somebody waits for it, and then not before `late_seconds` if it is held at all. With 0
// calls it begins as soon as the thread is free. Seeds differ in kind, too
// (modulo 4): 0 mixes; 1 makes default streams late, 2 the others; 3 makes each of them
// late for a while, then prompt.
struct Schedule {
  uint64_t seed = 0;
  uint64_t most_held_ops = 0;
  double held_seconds = 0;
  double late_seconds = 0;
};

// What one stream draws.
class Delays {
 public:
  explicit Delays(uint64_t seed = 0) : random_(seed) {}
  // After how many calls of the host the next piece may begin.
  uint64_t draw(const Schedule& schedule, bool is_default_stream);

 private:
  enum class Pace { at_once, mixed, late };
  Pace draw_pace(uint64_t seed, bool is_default_stream);

  std::mt19937_64 random_;
  Pace pace_ = Pace::mixed;
  uint64_t num_left_ = 0; // pieces, until the pace is drawn anew
};

} // namespace simgpu
