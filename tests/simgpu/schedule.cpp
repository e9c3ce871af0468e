// Draws that find missing waits: streams that are ahead of each other for long.
#include "schedule.h"

namespace simgpu {

Delays::Pace Delays::draw_pace(uint64_t seed, bool is_default_stream) {
  switch (seed % 4) {
    case 1:
      return is_default_stream ? Pace::late : Pace::at_once;
    case 2:
      return is_default_stream ? Pace::at_once : Pace::late;
    case 3:
      return random_() % 2 ? Pace::late : Pace::at_once;
    default:
      return Pace(random_() % 3);
  }
}

uint64_t Delays::draw(const Schedule& schedule, bool is_default_stream) {
  const auto most = schedule.most_held_ops;
  if (most == 0)
    return 0;
  if (num_left_ == 0) {
    pace_ = draw_pace(schedule.seed, is_default_stream);
    num_left_ = 1 + random_() % 48;
  }
  --num_left_;
  if (pace_ == Pace::mixed)
    return random_() % (most + 1);
  return pace_ == Pace::late ? most : 0;
}

} // namespace simgpu
