// The words of the errors that involve several threads.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "fibres/scheduler.h"

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  // "__shfl_sync(mask 0x0000ffff) at file:line"
  inline std::string BlockRunner::describe_wait(const Operation& operation, bool whole_block, unsigned mask, Site site)
      const {
    char mask_text[32] = "";
    if (!whole_block) std::snprintf(mask_text, sizeof(mask_text), " with mask 0x%08x", mask);
    return std::string(operation.name) + mask_text + " at " + site.file + ":" + std::to_string(site.line);
  }

  inline std::string BlockRunner::describe_fibre(const Fibre& fibre) const {
    if (fibre.state == State::exited) return "has exited";
    return "waits in " + describe_wait(*fibre.operation, fibre.whole_block, fibre.mask, fibre.site);
  }

  inline void BlockRunner::fail(const Fibre& fibre, const Operation& operation, unsigned mask, Site site,
                                const std::string& what) {
    const std::string wait = describe_wait(operation, false, mask, site);
    throw Error(location(launch_, ::blockIdx, &fibre) + "in " + wait + ": " + what);
  }

  // Called when nobody is ready: every fibre waits or has exited.
  inline std::string BlockRunner::describe_deadlock() const {
    // The thread to name first: a lane that waits for one that has exited, else a lane that waits for one that waits
    // elsewhere, else a thread at a block barrier.
    const Fibre* waiting = nullptr;
    const Fibre* missing = nullptr;
    for (const auto missing_state : {State::exited, State::waiting}) {
      for (unsigned i = 0; i < thread_count() && !missing; ++i) {
        const Fibre& fibre = fibres_[i];
        if (fibre.state != State::waiting || fibre.whole_block) continue;
        for (unsigned lane = 0; lane < 32 && !missing; ++lane) {
          if (!(fibre.mask >> lane & 1)) continue;
          const Fibre& other = fibres_[fibre.index - fibre.lane() + lane];
          const bool arrived = other.state == State::waiting && !other.whole_block &&
                               other.operation == fibre.operation && other.mask == fibre.mask;
          if (arrived || other.state != missing_state) continue;
          waiting = &fibre;
          missing = &other;
        }
      }
    }
    std::string what;
    if (waiting) {
      what = "deadlock: lane " + std::to_string(waiting->lane()) + " " + describe_fibre(*waiting) + " for lane " +
             std::to_string(missing->lane()) + ", thread " + to_text(missing->thread) + ", which " +
             describe_fibre(*missing);
    } else {
      for (unsigned i = 0; i < thread_count() && !waiting; ++i) {
        if (fibres_[i].state == State::waiting) waiting = &fibres_[i];
      }
      const Fibre* other = nullptr;
      for (unsigned i = 0; i < thread_count() && !other; ++i) {
        if (fibres_[i].state == State::exited || fibres_[i].operation != waiting->operation ||
            fibres_[i].site.line != waiting->site.line || !same_text(fibres_[i].site.file, waiting->site.file)) {
          other = &fibres_[i];
        }
      }
      what = "divergent barrier: it " + describe_fibre(*waiting);
      if (other) what += ", but thread " + to_text(other->thread) + " " + describe_fibre(*other);
    }

    // What everybody does.
    struct Group {
      std::string activity;
      unsigned size;
      std::string threads;
    };
    std::vector<Group> groups;
    for (unsigned i = 0; i < thread_count(); ++i) {
      const std::string activity = describe_fibre(fibres_[i]);
      Group* group = nullptr;
      for (Group& candidate : groups) {
        if (candidate.activity == activity) group = &candidate;
      }
      if (!group) {
        groups.push_back({activity, 0, ""});
        group = &groups.back();
      }
      if (++group->size <= 4) group->threads += " " + to_text(fibres_[i].thread);
      if (group->size == 5) group->threads += " ...";
    }
    what += ". No thread of the block can run:";
    const std::size_t most_groups = 8;
    for (std::size_t i = 0; i < groups.size() && i < most_groups; ++i) {
      what += "\n  " + std::to_string(groups[i].size) + " thread(s):" + groups[i].threads + ": " + groups[i].activity;
    }
    if (groups.size() > most_groups) what += "\n  ...";
    return location(launch_, ::blockIdx, waiting) + what;
  }

}  // namespace fibres
}  // namespace mpkernels
